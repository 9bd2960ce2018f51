#!lua flags=allow-oom
-- What a consumer was handed and has not acknowledged, without touching it (an XREADGROUP with explicit ids
-- would count as a delivery and prolong the lease, and is not replicated).
-- KEYS: 1 stream, 2 attempts
-- ARGV: 1 group, 2 consumer, 3 first entry id, "(" before it to leave it out, 4 count, 5 field
-- Returns {entries of {entry id, payload, attempts, 1 where the payload is kept beside the entry}, last entry
-- id seen or "", ghosts dropped}.
-- Keeps: leases as they are; only what was deleted (a ghost) leaves the pending list.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], '+', ARGV[4], ARGV[2])
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return {{}, '', 0} end
  return pending
end
local out, last, ghosts = {}, '', 0
for _, p in ipairs(pending) do
  last = p[1]
  local entry = redis.call('XRANGE', KEYS[1], last, last)[1]
  if entry then
    local fields = {}
    for f = 1, #entry[2], 2 do fields[entry[2][f]] = entry[2][f + 1] end
    local tries = redis.call('HGET', KEYS[2], KEYS[1] .. ' ' .. last)
    out[#out + 1] = {last, fields[ARGV[5]] or '', tries or '', tonumber(fields['r'] or 0)}
  else
    redis.call('XACK', KEYS[1], ARGV[1], last)
    redis.call('HDEL', KEYS[2], KEYS[1] .. ' ' .. last)
    ghosts = ghosts + 1
  end
end
return {out, last, ghosts}
