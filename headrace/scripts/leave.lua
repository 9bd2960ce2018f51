#!lua flags=allow-oom
-- Remove a consumer that holds nothing.
-- KEYS: streams
-- ARGV: 1 group, 2 consumer
-- Returns on how many streams it was removed.
-- Keeps: pending entries (XGROUP DELCONSUMER alone would drop them for ever).
local n = 0
for i = 1, #KEYS do
  local p = redis.pcall('XPENDING', KEYS[i], ARGV[1], '-', '+', 1, ARGV[2])
  if not p.err and #p == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[1], ARGV[2])
    n = n + 1
  end
end
return n
