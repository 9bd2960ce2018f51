#!lua
-- Accept jobs, each once.
-- KEYS: 1 jobs:interactive, 2 jobs:normal, 3 jobs:bulk, 4 runs, then for each run: marks, counters
-- ARGV: 1 group, 2 field, 3 bound, 4 retention seconds, 5 largest payload inside an entry, 6 number of runs R,
--       then R run names, then for each job: id, stream (1-3), run (1-R), tenant ('' for none), estimated
--       tokens, payload
-- Returns one word a job: "new"; "queued" (accepted before, unfinished); the status it ended with; "full".
-- Keeps: an id is in a job stream at most once for each time that it was accepted; a stream has its group; a
-- job is accepted only while fewer than `bound` jobs as urgent as itself, or more, wait or are leased (so a
-- bulk load never shuts out an interactive job). An accepted job waits in the list of its flow, in order.
-- Without allow-oom: a server at its maxmemory refuses the script before it starts, and nothing has changed.
local group, field, bound, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local inline, runs = tonumber(ARGV[5]), tonumber(ARGV[6])
local now = redis.call('TIME')[1]
local ahead, sum, indexed, last = {}, 0, {}, {}
for s = 1, 3 do
  sum = sum + redis.call('XLEN', KEYS[s])
  ahead[s] = sum
end
-- Whether the group has seen all that is in the stream. Where it has not (written by hand, or the group was
-- lost), new entries queue up behind that, and the next lease reads them in turn.
local function caught_up(s)
  if redis.call('EXISTS', KEYS[s]) == 0 then
    redis.call('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    return true
  end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[s])) do
    local g = {}
    for f = 1, #info, 2 do g[info[f]] = info[f + 1] end
    if g['name'] == group then
      return g['lag'] == 0 -- exact where it is 0, else too high or unknown
    end
  end
  return false
end
local out, fresh, flows = {}, {}, {{}, {}, {}}
for i = 7 + runs, #ARGV, 6 do
  local id, s, r, tenant, payload = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 5]
  local marks = KEYS[3 + 2 * r]
  local mark = redis.call('HGET', marks, id)
  if mark and mark ~= 'x' then
    out[#out + 1] = mark == 'q' and 'queued' or mark
  elseif ahead[s] >= bound then
    out[#out + 1] = 'full'
  else
    if indexed[s] == nil then indexed[s] = caught_up(s) end
    local flow = (tenant ~= '' and tenant .. '/' or '') .. ARGV[6 + r]
    if #payload <= inline then
      last[s] = redis.call('XADD', KEYS[s], '*', field, payload, 'f', flow, 't', ARGV[i + 4])
    else
      last[s] = redis.call('XADD', KEYS[s], '*', 'r', 1, 'f', flow, 't', ARGV[i + 4])
      redis.call('SET', KEYS[s] .. '#' .. last[s], payload)
    end
    redis.call('HSET', marks, id, 'q')
    flows[s][flow] = flows[s][flow] or {}
    table.insert(flows[s][flow], last[s])
    for t = s, 3 do ahead[t] = ahead[t] + 1 end
    fresh[r] = (fresh[r] or 0) + 1
    out[#out + 1] = 'new'
  end
end
-- A flow that comes to wait starts level with the one served least: it has no claim to the past.
local function enter(zset, member)
  if not redis.call('ZSCORE', zset, member) then
    local least = redis.call('ZRANGE', zset, 0, 0, 'WITHSCORES')
    redis.call('ZADD', zset, least[2] or 0, member)
  end
end
for s = 1, 3 do
  if indexed[s] then
    local top = KEYS[s] .. '/'
    for flow, entries in pairs(flows[s]) do
      redis.call('RPUSH', top .. flow, unpack(entries))
      local tenant, run = string.match(flow, '^(.*/)(.*)$')
      enter(top, tenant or flow)
      if tenant then enter(top .. tenant, run) end
    end
    redis.call('XGROUP', 'SETID', KEYS[s], group, last[s])
  end
end
for r, n in pairs(fresh) do
  redis.call('HINCRBY', KEYS[4 + 2 * r], 'submitted', n)
  redis.call('ZADD', KEYS[4], now, ARGV[6 + r])
  redis.call('EXPIRE', KEYS[3 + 2 * r], ttl)
  redis.call('EXPIRE', KEYS[4 + 2 * r], ttl)
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ttl)
return out
