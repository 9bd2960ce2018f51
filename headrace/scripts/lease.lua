#!lua flags=allow-oom
-- Hand jobs to a consumer: suspects to one that holds nothing, else each flow its share.
-- KEYS: 1-3 job streams, most urgent first, 4 attempts, 5 later, 6 suspects, 7 shares, 8 cancels
-- ARGV: 1 group, 2 consumer, 3 count, 4 field, 5 bytes of payload after which no more is added, 6-8 weights
--       of the streams, then runs whose jobs are left where they are
-- Returns {groups made, ghosts dropped, jobs and runs being cancelled, for each job {stream (1-3), entry id,
-- payload, attempts, 1 where the payload is kept beside the entry}}.
-- Keeps: what is returned is pending for the consumer, and for nobody else. A group of suspects is handed
-- over alone. Of each flow the oldest entry goes first; of the flows (runs, and tenants with their runs) the
-- one that was served least, in estimated tokens; of the streams the one that was served least by weight. An
-- entry whose payload was deleted (a ghost) is never handed out.
local group, consumer, left, field = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local room = tonumber(ARGV[5])
local made, ghosts, out = 0, 0, {}
local counted = redis.call('HLEN', KEYS[4]) > 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function give(s, entry)
  local fields = {}
  for f = 1, #entry[2], 2 do fields[entry[2][f]] = entry[2][f + 1] end
  local payload = fields[field] or ''
  local tries = counted and redis.call('HGET', KEYS[4], KEYS[s] .. ' ' .. entry[1]) or ''
  out[#out + 1] = {s, entry[1], payload, tries, tonumber(fields['r'] or 0)}
  left, room = left - 1, room - #payload
  return tonumber(fields['t']) or math.ceil(#payload / 4)
end
local function take(s, ids)
  local gone, tokens = {}, 0
  for _, id in ipairs(ids) do gone[id] = true end
  ids[#ids + 1] = 'FORCE' -- they are in no pending list yet
  for _, entry in ipairs(redis.call('XCLAIM', KEYS[s], group, consumer, 0, unpack(ids))) do
    gone[entry[1]] = nil
    tokens = tokens + give(s, entry)
  end
  for id in pairs(gone) do
    redis.call('HDEL', KEYS[4], KEYS[s] .. ' ' .. id)
    ghosts = ghosts + 1
  end
  return tokens
end

-- What the group has not seen: entries written by hand, or all of a stream whose group was lost. Then what
-- the index says of the stream no longer holds, and the stream itself is read instead.
local function forget_index(s)
  local top = KEYS[s] .. '/'
  for _, member in ipairs(redis.call('ZRANGE', top, 0, -1)) do
    if string.sub(member, -1) == '/' then
      for _, run in ipairs(redis.call('ZRANGE', top .. member, 0, -1)) do redis.call('DEL', top .. member .. run) end
    end
    redis.call('DEL', top .. member)
  end
  redis.call('DEL', top)
  for _, member in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
    if string.sub(member, 1, 2) == s .. ' ' then redis.call('ZREM', KEYS[5], member) end
  end
  local groups = redis.call('LRANGE', KEYS[6], 0, -1)
  redis.call('DEL', KEYS[6])
  for _, suspects in ipairs(groups) do
    local others = {}
    for of, id in string.gmatch(suspects, '(%d) (%S+)') do
      if tonumber(of) ~= s then others[#others + 1] = of .. ' ' .. id end
    end
    if #others > 0 then redis.call('RPUSH', KEYS[6], table.concat(others, ' ')) end
  end
end
for s = 1, 3 do
  if left <= 0 then break end
  local new = redis.pcall('XREADGROUP', 'GROUP', group, consumer, 'COUNT', left, 'STREAMS', KEYS[s], '>')
  if new and new.err then
    if not string.find(new.err, 'NOGROUP', 1, true) then return new end
    forget_index(s)
    redis.call('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    made = made + 1
    new = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', left, 'STREAMS', KEYS[s], '>')
  end
  if new then
    for _, entry in ipairs(new[1][2]) do give(s, entry) end
  end
end

-- Suspects: a group that was in flight together when an engine or a rank died, for an idle consumer alone.
local alone = false
if #out == 0 and redis.call('LLEN', KEYS[6]) > 0 then
  local idle = true
  for s = 1, 3 do
    idle = idle and #redis.call('XPENDING', KEYS[s], group, '-', '+', 1, consumer) == 0
  end
  while idle and #out == 0 do
    local suspects = redis.call('LPOP', KEYS[6])
    if not suspects then break end
    local rest = {}
    for s, id in string.gmatch(suspects, '(%d) (%S+)') do
      if left > 0 then take(tonumber(s), {id}) else rest[#rest + 1] = s .. ' ' .. id end
    end
    alone = #out > 0
    if #rest > 0 then redis.call('LPUSH', KEYS[6], table.concat(rest, ' ')) end
  end
end

local function older(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_seq) < tonumber(b_seq)
end
local function enter(zset, member)
  if not redis.call('ZSCORE', zset, member) then
    local least = redis.call('ZRANGE', zset, 0, 0, 'WITHSCORES')
    redis.call('ZADD', zset, least[2] or 0, member)
  end
end
-- Released jobs, and retries that are due, take their old places in their flows.
local due = not alone and redis.call('ZCARD', KEYS[5]) > 0
  and redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', now, 'LIMIT', 0, 1000) or {}
local back = {}
for _, member in ipairs(due) do
  local s, id, flow = string.match(member, '^(%d) (%S+) (%S+)$')
  local list = s .. ' ' .. flow
  back[list] = back[list] or {}
  table.insert(back[list], id)
  redis.call('ZREM', KEYS[5], member)
end
for name, ids in pairs(back) do
  local s, flow = string.match(name, '^(%d) (%S+)$')
  local top = KEYS[tonumber(s)] .. '/'
  table.sort(ids, older)
  local newest = ids[#ids]
  while true do -- those before it were put back earlier: what never was leased is newer than what was
    local head = redis.call('LINDEX', top .. flow, 0)
    if not head or not older(head, newest) then break end
    ids[#ids + 1] = redis.call('LPOP', top .. flow)
  end
  table.sort(ids, older)
  for i = #ids, 1, -1 do redis.call('LPUSH', top .. flow, ids[i]) end
  local tenant, run = string.match(flow, '^(.*/)(.*)$')
  enter(top, tenant or flow)
  if tenant then enter(top .. tenant, run) end
end

-- The flow of a set that was served least and has something to hand out: its list, the sets and members to
-- charge, and among how many flows the set is shared. A flow found empty is forgotten: it has no debt left.
local blocked = {}
for i = 9, #ARGV do blocked[ARGV[i]] = true end
local function pick(zset)
  local from = 0
  while true do
    local member = redis.call('ZRANGE', zset, from, from)[1]
    if not member then return nil end
    local key = zset .. member
    if redis.call('EXISTS', key) == 0 then
      redis.call('ZREM', zset, member)
    elseif string.sub(member, -1) == '/' then
      local list, path, share = pick(key)
      if list then
        path[#path + 1] = {zset, member}
        return list, path, share * redis.call('ZCARD', zset)
      end
      if redis.call('EXISTS', key) == 1 then from = from + 1 end
    elseif blocked[member] then
      from = from + 1
    else
      return key, {{zset, member}}, redis.call('ZCARD', zset)
    end
  end
end
local open, weights, served = {}, 0, redis.call('HMGET', KEYS[7], 1, 2, 3, 'last')
for i = 1, 4 do served[i] = tonumber(served[i] or 0) end
if not alone then
  for s = 1, 3 do
    open[s] = pick(KEYS[s] .. '/') ~= nil
    if open[s] then weights = weights + ARGV[5 + s] end
  end
end
local fair = false
while left > 0 and room > 0 do
  local best
  for s = 1, 3 do
    -- one that had nothing waiting has no claim to the past
    if open[s] then served[s] = math.max(served[s], served[4]) end
    if open[s] and (not best or served[s] < served[best]) then best = s end
  end
  if not best then break end
  local list, path, share = pick(KEYS[best] .. '/')
  if not list then
    open[best], weights = false, weights - ARGV[5 + best]
  else
    -- a run of neighbours at a time: prompts that begin alike stay together
    local some = math.max(1, math.min(64, math.floor(left * ARGV[5 + best] / weights / share)))
    local tokens = take(best, redis.call('LPOP', list, some))
    for _, at in ipairs(path) do redis.call('ZINCRBY', at[1], tokens, at[2]) end
    served[4] = served[best]
    served[best] = served[best] + tokens / ARGV[5 + best]
    fair = true
  end
end
if fair then
  redis.call('HSET', KEYS[7], 1, string.format('%.3f', served[1]), 2, string.format('%.3f', served[2]),
    3, string.format('%.3f', served[3]), 'last', string.format('%.3f', served[4]))
end
return {made, ghosts, redis.call('ZCARD', KEYS[8]), out}
