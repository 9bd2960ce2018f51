-- Take over leases that ran out. One page: the caller keeps the cursor until it is "0-0" again, because
-- one call looks at 10 x count entries at most and would never get past many live leases.
-- KEYS: 1 stream, 2 attempts
-- ARGV: 1 group, 2 consumer, 3 idle milliseconds, 4 cursor, 5 count, 6 field
-- Returns {next cursor, entries of {entry id, payload, failed deliveries}, ghosts dropped}.
-- Keeps: each take-over counts one failed delivery.
local reply = redis.pcall('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
if reply.err then
  if string.find(reply.err, 'NOGROUP', 1, true) then return {'0-0', {}, 0} end
  return reply
end
local out = {}
for _, entry in ipairs(reply[2]) do
  local payload = ''
  for f = 1, #entry[2], 2 do
    if entry[2][f] == ARGV[6] then payload = entry[2][f + 1] end
  end
  out[#out + 1] = {entry[1], payload, redis.call('HINCRBY', KEYS[2], KEYS[1] .. ' ' .. entry[1], 1)}
end
return {reply[1], out, reply[3] and #reply[3] or 0}
