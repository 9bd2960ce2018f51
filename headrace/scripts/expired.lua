#!lua flags=no-writes
-- Leases that were not renewed in time, with who holds them.
-- KEYS: 1-3 job streams
-- ARGV: 1 group, 2 idle milliseconds, 3 most of each stream
-- Returns for each: stream (1-3), entry id, consumer.
-- Keeps: nothing changes. The whole pending list is looked at (not 10 x count entries of it, as XAUTOCLAIM
-- does), so that no number of live leases hides one that ran out.
local out = {}
for s = 1, 3 do
  local pending = redis.pcall('XPENDING', KEYS[s], ARGV[1], 'IDLE', ARGV[2], '-', '+', ARGV[3])
  if not pending.err then
    for _, p in ipairs(pending) do out[#out + 1] = {s, p[1], p[2]} end
  elseif not string.find(pending.err, 'NOGROUP', 1, true) then
    return pending
  end
end
return out
