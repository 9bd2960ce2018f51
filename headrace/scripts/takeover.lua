-- Hand all that a dead consumer holds back, one page, and remove the consumer with its last entry.
-- KEYS: 1 stream, 2 attempts
-- ARGV: 1 group, 2 dead consumer, 3 the consumer that holds released jobs, 4 count
-- Returns how many were handed back; 0 means that it holds nothing more.
-- Keeps: each counts one failed delivery.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[4], ARGV[2])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return 0 end
  return pending
end
if #pending == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return 0
end
for _, p in ipairs(pending) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, p[1], 'JUSTID')
  redis.call('HINCRBY', KEYS[2], KEYS[1] .. ' ' .. p[1], 1)
end
return #pending
