#!lua flags=allow-oom
-- Take over leases that ran out. One page: the caller keeps the cursor until it is "0-0" again, because
-- one call looks at 10 x count entries at most and would never get past many live leases.
-- KEYS: 1 stream, 2 attempts
-- ARGV: 1 group, 2 consumer, 3 idle milliseconds, 4 cursor, 5 count, 6 field,
--       7 the consumer that holds released jobs
-- Returns {next cursor, entries of {entry id, payload, failed deliveries}, ghosts dropped}.
-- Keeps: each take-over counts one failed delivery, except of released jobs, which wait and failed nobody,
-- and of the caller's own, which it was handed by a reply that was lost.
local spared = {}
for _, owner in ipairs({ARGV[7], ARGV[2]}) do
  local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[4], '+', 10 * ARGV[5], owner)
  if held.err then
    if string.find(held.err, 'NOGROUP', 1, true) then return {'0-0', {}, 0} end
    return held
  end
  for _, p in ipairs(held) do spared[p[1]] = true end
end
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local out = {}
for _, entry in ipairs(reply[2]) do
  local payload = ''
  for f = 1, #entry[2], 2 do
    if entry[2][f] == ARGV[6] then payload = entry[2][f + 1] end
  end
  local name = KEYS[1] .. ' ' .. entry[1]
  if not spared[entry[1]] then redis.call('HINCRBY', KEYS[2], name, 1) end
  out[#out + 1] = {entry[1], payload, tonumber(redis.call('HGET', KEYS[2], name) or 0)}
end
for _, id in ipairs(reply[3]) do redis.call('HDEL', KEYS[2], KEYS[1] .. ' ' .. id) end
return {reply[1], out, #reply[3]}
