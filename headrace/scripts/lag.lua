#!lua flags=no-writes
-- How many completions a sink has before it.
-- KEYS: 1 result stream
-- ARGV: 1 group
-- Returns the number not read, or read and not acknowledged. Never too low: where the server cannot count
-- (a group made after entries were trimmed), every entry of the stream is taken as not read.
local info = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if info.err then return 0 end -- no stream
local length = redis.call('XLEN', KEYS[1])
for _, flat in ipairs(info) do
  local group = {}
  for f = 1, #flat, 2 do group[flat[f]] = flat[f + 1] end
  if group['name'] == ARGV[1] then
    if redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1] == nil then return group['pending'] end
    return group['pending'] + (group['lag'] or length)
  end
end
return length
