#!lua flags=allow-oom
-- Hand leased jobs back: now, or after a delay that the server keeps.
-- KEYS: 1-3 job streams, 4 attempts, 5 later, 6 suspects
-- ARGV: 1 group, 2 consumer, 3 milliseconds until the next lease may hand them out, 4 cause: "released" (a
--       drain), "error" (the job failed and is tried again) or "held" (for a newer engine; nothing is
--       counted), then for each entry: stream (1-3), entry id
-- Returns how many were still held.
-- Keeps: an entry that another consumer took stays with it. A job keeps its place in its flow; suspects stay
-- a group.
local n, together = 0, {}
local time = redis.call('TIME')
local due = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3])
for i = 5, #ARGV, 2 do
  local s, id = tonumber(ARGV[i]), ARGV[i + 1]
  local p = redis.pcall('XPENDING', KEYS[s], ARGV[1], id, id, 1, ARGV[2])
  if not p.err and #p == 1 then
    local name = KEYS[s] .. ' ' .. id
    local entry = redis.call('XRANGE', KEYS[s], id, id)[1]
    redis.call('XACK', KEYS[s], ARGV[1], id)
    if entry then
      local flow = '_' -- written by hand
      for f = 1, #entry[2], 2 do
        if entry[2][f] == 'f' then flow = entry[2][f + 1] end
      end
      local c, e, r, proven, crash =
        string.match(redis.call('HGET', KEYS[4], name) or '0 0 0 0 -', '^(%d+) (%d+) (%d+) (%d) (%S+)$')
      if ARGV[4] == 'error' then e = e + 1 end
      if ARGV[4] == 'released' then r = r + 1 end
      if ARGV[4] ~= 'held' then
        redis.call('HSET', KEYS[4], name, string.format('%d %d %d %s %s', c, e, r, proven, crash))
      end
      if tonumber(c) > 0 and proven == '0' and tonumber(ARGV[3]) == 0 then
        together[#together + 1] = s .. ' ' .. id
      else
        redis.call('ZADD', KEYS[5], tonumber(ARGV[3]) > 0 and due or 0, s .. ' ' .. id .. ' ' .. flow)
      end
      n = n + 1
    else
      redis.call('HDEL', KEYS[4], name)
    end
  end
end
if #together > 0 then redis.call('LPUSH', KEYS[6], table.concat(together, ' ')) end
return n
