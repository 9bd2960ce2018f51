#!lua flags=allow-oom
-- Hand the waiting jobs of one run to a consumer that means to end them.
-- KEYS: 1-3 job streams, 4 attempts, 5 later
-- ARGV: 1 group, 2 consumer, 3 count, 4 field, 5 run
-- Returns for each job {stream (1-3), entry id, payload, attempts, 1 where the payload is kept beside it}.
-- Keeps: what is returned is pending for the consumer, and for nobody else.
local left, run, out = tonumber(ARGV[3]), ARGV[5], {}
local function claim(s, ids)
  left = left - #ids
  ids[#ids + 1] = 'FORCE' -- they are in no pending list yet
  for _, entry in ipairs(redis.call('XCLAIM', KEYS[s], ARGV[1], ARGV[2], 0, unpack(ids))) do
    local fields = {}
    for f = 1, #entry[2], 2 do fields[entry[2][f]] = entry[2][f + 1] end
    local tries = redis.call('HGET', KEYS[4], KEYS[s] .. ' ' .. entry[1])
    out[#out + 1] = {s, entry[1], fields[ARGV[4]] or '', tries or '', tonumber(fields['r'] or 0)}
  end
end
local grouped = {} -- what a lost group had in its lists, the next lease reads from the stream
for s = 1, 3 do
  grouped[s] = not redis.pcall('XPENDING', KEYS[s], ARGV[1]).err
  local top = KEYS[s] .. '/'
  local lists = {top .. run}
  for _, member in ipairs(redis.call('ZRANGE', top, 0, -1)) do
    if string.sub(member, -1) == '/' then lists[#lists + 1] = top .. member .. run end
  end
  for _, list in ipairs(lists) do
    if left > 0 and grouped[s] and redis.call('EXISTS', list) == 1 then claim(s, redis.call('LPOP', list, left)) end
  end
end
for _, member in ipairs(left > 0 and redis.call('ZRANGE', KEYS[5], 0, -1) or {}) do
  local s, id, tenant, name = string.match(member, '^(%d) (%S+) (.-)([^/ ]+)$')
  if left > 0 and name == run and grouped[tonumber(s)] then
    redis.call('ZREM', KEYS[5], member)
    claim(tonumber(s), {id})
  end
end
return out
