#!lua flags=allow-oom
-- Make sure that a sink's group stands on a result stream, from its first entry.
-- KEYS: 1 result stream
-- ARGV: 1 group, 2 seconds after which an empty stream that nobody writes to is dropped (0: never)
-- Returns 1 where it was created, 0 where it stood.
local reply = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if reply.err then
  if string.find(reply.err, 'BUSYGROUP', 1, true) then return 0 end
  return reply
end
if ARGV[2] ~= '0' and redis.call('XLEN', KEYS[1]) == 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 1
