#!lua flags=allow-oom
-- Compare what waits with the index of it, and make the index again where they differ (a key was deleted by
-- hand): an entry that no list names would wait for ever.
-- KEYS: 1-3 job streams, 4 later, 5 suspects
-- ARGV: 1 group
-- Returns how many entries were put into lists, -1 where nothing was amiss.
-- Keeps: every entry is leased, later, suspect, in one list, or not read by the group yet; exactly one of these.
local group, known, streams = ARGV[1], {{}, {}, {}}, {}
local function walk(s, visit)
  local top = KEYS[s] .. '/'
  for _, member in ipairs(redis.call('ZRANGE', top, 0, -1)) do
    if string.sub(member, -1) == '/' then
      for _, run in ipairs(redis.call('ZRANGE', top .. member, 0, -1)) do visit(top .. member .. run) end
    else
      visit(top .. member)
    end
  end
end
local apart = {0, 0, 0}
for _, member in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  local s, id = string.match(member, '^(%d) (%S+)')
  known[tonumber(s)][id] = true
  apart[tonumber(s)] = apart[tonumber(s)] + 1
end
for _, suspects in ipairs(redis.call('LRANGE', KEYS[5], 0, -1)) do
  for s, id in string.gmatch(suspects, '(%d) (%S+)') do
    known[tonumber(s)][id] = true
    apart[tonumber(s)] = apart[tonumber(s)] + 1
  end
end
local put, amiss = 0, false
for s = 1, 3 do
  local seen = false
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[s])
  for _, info in ipairs(groups.err and {} or groups) do
    local g = {}
    for f = 1, #info, 2 do g[info[f]] = info[f + 1] end
    if g['name'] == group then seen = g['last-delivered-id'] end
  end
  -- what the group has not read yet is in the stream's hands; a lease reads it before anything else
  if seen and not redis.call('XREAD', 'COUNT', 1, 'STREAMS', KEYS[s], seen) then
    local waiting = redis.call('XLEN', KEYS[s]) - redis.call('XPENDING', KEYS[s], group)[1] - apart[s]
    walk(s, function(list) waiting = waiting - redis.call('LLEN', list) end)
    if waiting ~= 0 then
      amiss = true
      walk(s, function(list) redis.call('DEL', list) end)
      local from = '-'
      while true do
        local page = redis.call('XPENDING', KEYS[s], group, from, '+', 1000)
        if #page == 0 then break end
        for _, p in ipairs(page) do known[s][p[1]] = true end
        from = '(' .. page[#page][1]
      end
      from = '-'
      while true do
        local page = redis.call('XRANGE', KEYS[s], from, '+', 'COUNT', 100)
        if #page == 0 then break end
        for _, entry in ipairs(page) do
          if not known[s][entry[1]] then
            local flow, top = '_', KEYS[s] .. '/'
            for f = 1, #entry[2], 2 do
              if entry[2][f] == 'f' then flow = entry[2][f + 1] end
            end
            redis.call('RPUSH', top .. flow, entry[1])
            local tenant, run = string.match(flow, '^(.*/)(.*)$')
            redis.call('ZADD', top, 'NX', 0, tenant or flow)
            if tenant then redis.call('ZADD', top .. tenant, 'NX', 0, run) end
            put = put + 1
          end
        end
        from = '(' .. page[#page][1]
      end
    end
  end
end
return amiss and put or -1
