#!lua flags=allow-oom
-- Hand leased jobs back: the next lease, by anyone, gets them first.
-- KEYS: 1 attempts, then for each entry: its stream
-- ARGV: 1 group, 2 consumer, 3 the consumer that holds released jobs, 4 failed deliveries to add (0 or 1),
--       then for each entry: entry id
-- Returns how many were still held.
-- Keeps: an entry that another consumer took stays with it; no delivery is counted unless asked for.
local n = 0
for i = 2, #KEYS do
  local id = ARGV[3 + i]
  local p = redis.pcall('XPENDING', KEYS[i], ARGV[1], id, id, 1, ARGV[2])
  if not p.err and #p == 1 then
    if #redis.call('XCLAIM', KEYS[i], ARGV[1], ARGV[3], 0, id, 'JUSTID') == 1 then
      if ARGV[4] ~= '0' then redis.call('HINCRBY', KEYS[1], KEYS[i] .. ' ' .. id, ARGV[4]) end
      n = n + 1
    end
  end
end
return n
