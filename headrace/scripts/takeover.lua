#!lua flags=allow-oom
-- Hand all that a dead consumer holds back, one page, and remove the consumer with its last entry.
-- KEYS: 1 stream, 2 attempts
-- ARGV: 1 group, 2 dead consumer, 3 the consumer that holds released jobs, 4 count
-- Returns {entries of this page, jobs of them handed back}; no entries: the consumer is gone.
-- Keeps: each counts one failed delivery; a ghost leaves the pending list.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[4], ARGV[2])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return {0, 0} end
  return pending
end
if #pending == 0 then
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  return {0, 0}
end
local n = 0
for _, p in ipairs(pending) do
  local name = KEYS[1] .. ' ' .. p[1]
  if #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, p[1], 'JUSTID') == 1 then
    redis.call('HINCRBY', KEYS[2], name, 1)
    n = n + 1
  else
    redis.call('HDEL', KEYS[2], name)
  end
end
return {#pending, n}
