#!lua flags=allow-oom
-- Prolong leases that still stand.
-- KEYS: for each entry: its stream
-- ARGV: 1 group, 2 consumer, then for each entry: entry id
-- Returns the numbers (from 1) of the entries that the consumer has lost.
-- Keeps: a lease that another consumer took is not taken back (docket#250), and no delivery is counted
-- (JUSTID).
local lost = {}
for i = 1, #KEYS do
  local id = ARGV[2 + i]
  local p = redis.pcall('XPENDING', KEYS[i], ARGV[1], id, id, 1, ARGV[2])
  if p.err or #p == 0 or #redis.call('XCLAIM', KEYS[i], ARGV[1], ARGV[2], 0, id, 'JUSTID') == 0 then
    lost[#lost + 1] = i
  end
end
return lost
