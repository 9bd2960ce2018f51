#!lua
-- End rows that could not become jobs, each once: they have a completion, and never were in a job stream.
-- KEYS: 1 runs, then for each item: marks, counters, result stream
-- ARGV: 1 field, 2 retention seconds, then for each item: id, run, status, payload
-- Returns "done" or "duplicate" for each item.
-- Keeps: a marked id emits nothing a second time, and submitted counts what ended.
-- Without allow-oom, as submit.
local out = {}
local now = redis.call('TIME')[1]
local k = 2
for i = 3, #ARGV, 4 do
  local marks, run, results = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  k = k + 3
  local mark = redis.call('HGET', marks, ARGV[i])
  if mark and mark ~= 'x' then
    out[#out + 1] = 'duplicate'
  else
    redis.call('XADD', results, '*', ARGV[1], ARGV[i + 3])
    redis.call('PERSIST', results)
    redis.call('HSET', marks, ARGV[i], ARGV[i + 2])
    redis.call('HINCRBY', run, 'submitted', 1)
    redis.call('HINCRBY', run, ARGV[i + 2], 1)
    redis.call('EXPIRE', marks, ARGV[2])
    redis.call('EXPIRE', run, ARGV[2])
    redis.call('ZADD', KEYS[1], now, ARGV[i + 1])
    out[#out + 1] = 'done'
  end
end
return out
