-- Hand jobs to a consumer: released ones first, then new ones, the most urgent stream first.
-- KEYS: 1-3 job streams, most urgent first, 4 attempts
-- ARGV: 1 group, 2 consumer, 3 the consumer that holds released jobs, 4 count, 5 field
-- Returns for each job: stream (1-3), entry id, payload, failed deliveries so far.
-- Keeps: what is returned is pending for the consumer, and for nobody else.
local group, consumer, free, left, field = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local out = {}
local function give(s, entry)
  if not entry or not entry[2] then return end
  local payload = ''
  for f = 1, #entry[2], 2 do
    if entry[2][f] == field then payload = entry[2][f + 1] end
  end
  local failed = redis.call('HGET', KEYS[4], KEYS[s] .. ' ' .. entry[1])
  out[#out + 1] = {s, entry[1], payload, tonumber(failed or 0)}
  left = left - 1
end
local function grouped(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    if not string.find(reply.err, 'NOGROUP', 1, true) then return reply end
    return false
  end
  return reply
end
for s = 1, 3 do
  if left <= 0 then break end
  local released = grouped('XPENDING', KEYS[s], group, '-', '+', left, free)
  if released == false then
    -- first use, or the server lost its data: from the start, so that no entry is passed over
    redis.call('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    released = {}
  elseif released.err then
    return released
  end
  if #released > 0 then
    local ids = {}
    for i, p in ipairs(released) do ids[i] = p[1] end
    for _, entry in ipairs(redis.call('XCLAIM', KEYS[s], group, consumer, 0, unpack(ids))) do
      give(s, entry)
    end
  end
  if left > 0 then
    local new = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', left, 'STREAMS', KEYS[s], '>')
    if new then
      for _, entry in ipairs(new[1][2]) do give(s, entry) end
    end
  end
end
return out
