-- Accept jobs, each once.
-- KEYS: 1 jobs:interactive, 2 jobs:normal, 3 jobs:bulk, 4 runs, then for each run: marks, counters
-- ARGV: 1 group, 2 field, 3 bound (jobs waiting or leased), 4 retention seconds, 5 number of runs R,
--       then R run names, then for each job: id, stream (1-3), run (1-R), payload
-- Returns one word a job: "new"; "queued" (accepted before, unfinished); the status it ended with; "full".
-- Keeps: an id is in a job stream at most once for each time that it was accepted, and a stream has its group.
local group, field, bound, ttl, runs = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local waiting = 0
for s = 1, 3 do waiting = waiting + redis.call('XLEN', KEYS[s]) end
local now = redis.call('TIME')[1]
local out, touched = {}, {}
for i = 6 + runs, #ARGV, 4 do
  local id, s, r = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local marks, run = KEYS[3 + 2 * r], KEYS[4 + 2 * r]
  local mark = redis.call('HGET', marks, id)
  if mark and mark ~= 'x' then
    out[#out + 1] = mark == 'q' and 'queued' or mark
  elseif waiting >= bound then
    out[#out + 1] = 'full'
  else
    if redis.call('EXISTS', KEYS[s]) == 0 then
      redis.pcall('XGROUP', 'CREATE', KEYS[s], group, '0', 'MKSTREAM')
    end
    redis.call('XADD', KEYS[s], '*', field, ARGV[i + 3])
    redis.call('HSET', marks, id, 'q')
    redis.call('HINCRBY', run, 'submitted', 1)
    waiting = waiting + 1
    touched[r] = true
    out[#out + 1] = 'new'
  end
end
for r in pairs(touched) do
  redis.call('ZADD', KEYS[4], now, ARGV[5 + r])
  redis.call('EXPIRE', KEYS[3 + 2 * r], ttl)
  redis.call('EXPIRE', KEYS[4 + 2 * r], ttl)
end
return out
