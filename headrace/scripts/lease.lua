#!lua flags=allow-oom
-- Hand jobs to a consumer: the most urgent stream first, and of each stream the released ones first.
-- KEYS: 1-3 job streams, most urgent first, 4 attempts
-- ARGV: 1 group, 2 consumer, 3 the consumer that holds released jobs, 4 count, 5 field
-- Returns {groups made, ghosts dropped, for each job {stream (1-3), entry id, payload, failed deliveries}}.
-- Keeps: what is returned is pending for the consumer, and for nobody else. An entry whose payload was
-- deleted (a ghost) leaves the pending list and is never handed out.
local group, consumer, free, left, field = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local made, ghosts, out = 0, 0, {}
local function give(s, entry)
  local payload = ''
  for f = 1, #entry[2], 2 do
    if entry[2][f] == field then payload = entry[2][f + 1] end
  end
  local failed = redis.call('HGET', KEYS[4], KEYS[s] .. ' ' .. entry[1])
  out[#out + 1] = {s, entry[1], payload, tonumber(failed or 0)}
  left = left - 1
end
for s = 1, 3 do
  if left <= 0 then break end
  local released = redis.pcall('XPENDING', KEYS[s], group, '-', '+', left, free)
  if released.err then
    if not string.find(released.err, 'NOGROUP', 1, true) then return released end
    -- first use, or the server lost its data: from the start, so that no entry is passed over
    redis.call('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    made = made + 1
    released = {}
  end
  if #released > 0 then
    local ids, gone = {}, {}
    for i, p in ipairs(released) do
      ids[i] = p[1]
      gone[p[1]] = true
    end
    for _, entry in ipairs(redis.call('XCLAIM', KEYS[s], group, consumer, 0, unpack(ids))) do
      gone[entry[1]] = nil
      give(s, entry)
    end
    for id in pairs(gone) do
      redis.call('HDEL', KEYS[4], KEYS[s] .. ' ' .. id)
      ghosts = ghosts + 1
    end
  end
  if left > 0 then
    local new = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', left, 'STREAMS', KEYS[s], '>')
    if new then
      for _, entry in ipairs(new[1][2]) do give(s, entry) end
    end
  end
end
return {made, ghosts, out}
