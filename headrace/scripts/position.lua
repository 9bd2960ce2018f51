#!lua flags=no-writes
-- Where a consumer that found nothing should wait: the last entry that each stream handed over.
-- KEYS: 1-3 job streams
-- ARGV: 1 group
-- Returns for each stream the entry id after which XREAD BLOCK sees what nobody leased yet.
-- Keeps: nothing changes. A wait from here misses no entry that was added between the lease and the wait.
local group, out = ARGV[1], {}
for s = 1, #KEYS do
  out[s] = '0-0'
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[s])
  if not groups.err then
    for _, info in ipairs(groups) do
      local fields = {}
      for f = 1, #info, 2 do fields[info[f]] = info[f + 1] end
      if fields['name'] == group then out[s] = fields['last-delivered-id'] end
    end
  end
end
return out
