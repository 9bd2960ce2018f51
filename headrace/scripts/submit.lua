#!lua
-- Accept jobs, each once.
-- KEYS: 1 jobs:interactive, 2 jobs:normal, 3 jobs:bulk, 4 runs, then for each run: marks, counters
-- ARGV: 1 group, 2 field, 3 bound, 4 retention seconds, 5 number of runs R,
--       then R run names, then for each job: id, stream (1-3), run (1-R), payload
-- Returns one word a job: "new"; "queued" (accepted before, unfinished); the status it ended with; "full".
-- Keeps: an id is in a job stream at most once for each time that it was accepted; a stream has its group; a
-- job is accepted only while fewer than `bound` jobs as urgent as itself, or more, wait or are leased (so a
-- bulk load never shuts out an interactive job).
-- Without allow-oom: a server at its maxmemory refuses the script before it starts, and nothing has changed.
local group, field, bound, ttl, runs = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local now = redis.call('TIME')[1]
local ahead, sum = {}, 0
for s = 1, 3 do
  sum = sum + redis.call('XLEN', KEYS[s])
  ahead[s] = sum
end
local out, fresh = {}, {}
for i = 6 + runs, #ARGV, 4 do
  local id, s, r = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local marks = KEYS[3 + 2 * r]
  local mark = redis.call('HGET', marks, id)
  if mark and mark ~= 'x' then
    out[#out + 1] = mark == 'q' and 'queued' or mark
  elseif ahead[s] >= bound then
    out[#out + 1] = 'full'
  else
    if redis.call('EXISTS', KEYS[s]) == 0 then
      redis.call('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    end
    redis.call('XADD', KEYS[s], '*', field, ARGV[i + 3])
    redis.call('HSET', marks, id, 'q')
    for t = s, 3 do ahead[t] = ahead[t] + 1 end
    fresh[r] = (fresh[r] or 0) + 1
    out[#out + 1] = 'new'
  end
end
for r, n in pairs(fresh) do
  redis.call('HINCRBY', KEYS[4 + 2 * r], 'submitted', n)
  redis.call('ZADD', KEYS[4], now, ARGV[5 + r])
  redis.call('EXPIRE', KEYS[3 + 2 * r], ttl)
  redis.call('EXPIRE', KEYS[4 + 2 * r], ttl)
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ttl)
return out
