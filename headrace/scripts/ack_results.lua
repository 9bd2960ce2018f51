#!lua flags=allow-oom
-- A sink is done with completions: acknowledge them, then delete what every group is done with.
-- KEYS: 1 result stream
-- ARGV: 1 group, 2 seconds after which a stream left empty is dropped with its groups (0: never), then entry ids
-- Returns the number of entries deleted.
-- Keeps: an entry that some group has not read, or has read and not acknowledged, stays. An ended run's stream
-- does not stay for ever; one that is written to again does.
for i = 3, #ARGV, 500 do
  redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, i, math.min(i + 499, #ARGV)))
end
local function split(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local low_ms, low_seq
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for f = 1, #info, 2 do group[info[f]] = info[f + 1] end
  local ms, seq
  if group['pending'] > 0 then
    ms, seq = split(redis.call('XPENDING', KEYS[1], group['name'])[2])
  else
    ms, seq = split(group['last-delivered-id'])
    seq = seq + 1
  end
  if not low_ms or ms < low_ms or (ms == low_ms and seq < low_seq) then low_ms, low_seq = ms, seq end
end
if not low_ms then return 0 end
local n = redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f-%.0f', low_ms, low_seq))
if ARGV[2] ~= '0' and redis.call('XLEN', KEYS[1]) == 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return n
