#!lua flags=allow-oom
-- Jobs that were in flight together when their engine or one of its ranks died, or their leases ran out,
-- become suspects: two groups of half as many, each to be run alone.
-- KEYS: 1-3 job streams, 4 attempts, 5 later, 6 suspects, 7 crashes
-- ARGV: 1 group, 2 consumer that held them, 3 milliseconds that a lease must have been idle, 4 evidence (JSON),
--       5 crashes after which a job that was alone in the last one is proven to be the cause,
--       then for each entry: stream (1-3), entry id
-- Returns {jobs that were still held, ghosts dropped}.
-- Keeps: each of them counts one crash. A proven cause waits in its flow to be ended as dead by whoever
-- leases it. The evidence of the last thousand crashes is kept.
local group, consumer, idle = ARGV[1], ARGV[2], tonumber(ARGV[3])
local held, ghosts = {}, 0
for i = 6, #ARGV, 2 do
  local s, id = tonumber(ARGV[i]), ARGV[i + 1]
  local p = redis.pcall('XPENDING', KEYS[s], group, id, id, 1, consumer)
  if not p.err and #p == 1 and p[1][3] >= idle then
    local entry = redis.call('XRANGE', KEYS[s], id, id)[1]
    redis.call('XACK', KEYS[s], group, id)
    if entry then
      local flow = '_' -- written by hand
      for f = 1, #entry[2], 2 do
        if entry[2][f] == 'f' then flow = entry[2][f + 1] end
      end
      held[#held + 1] = {s, id, flow}
    else
      redis.call('HDEL', KEYS[4], KEYS[s] .. ' ' .. id)
      ghosts = ghosts + 1
    end
  end
end
if #held == 0 then return {0, ghosts} end
local alone = #held == 1
for s = 1, 3 do
  local others = redis.pcall('XPENDING', KEYS[s], group, '-', '+', 1, consumer)
  alone = alone and (others.err ~= nil or #others == 0)
end
local crash = redis.call('XADD', KEYS[7], 'MAXLEN', 1000, '*', 'e', ARGV[4])
local halves, half = {{}, {}}, math.ceil(#held / 2)
for i, job in ipairs(held) do
  local name = KEYS[job[1]] .. ' ' .. job[2]
  local c, e, r = string.match(redis.call('HGET', KEYS[4], name) or '0 0 0 0 -', '^(%d+) (%d+) (%d+)')
  c = c + 1
  local proven = alone and c >= tonumber(ARGV[5])
  redis.call('HSET', KEYS[4], name, string.format('%d %d %d %d %s', c, e, r, proven and 1 or 0, crash))
  if proven then
    redis.call('ZADD', KEYS[5], 0, job[1] .. ' ' .. job[2] .. ' ' .. job[3])
  else
    table.insert(halves[i <= half and 1 or 2], job[1] .. ' ' .. job[2])
  end
end
for _, suspects in ipairs(halves) do -- behind other groups, so that innocents end between two crashes
  if #suspects > 0 then redis.call('RPUSH', KEYS[6], table.concat(suspects, ' ')) end
end
return {#held, ghosts}
