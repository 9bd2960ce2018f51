#!lua flags=allow-oom
-- Ask for jobs, or whole runs, to end as cancelled.
-- KEYS: 1 cancels, then for each item: the run's marks
-- ARGV: 1 retention seconds, then for each item: run, job id ('' for the whole run)
-- Returns one word an item: "cancelling"; the status that the job ended with; "unknown".
-- Keeps: what is asked for holds until the job ends or its run is forgotten. A run may be cancelled before
-- its first job.
local now = redis.call('TIME')[1]
local out = {}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1])
for k = 2, #KEYS do
  local run, id = ARGV[2 * k - 2], ARGV[2 * k - 1]
  if id == '' then
    redis.call('ZADD', KEYS[1], now, run)
    out[#out + 1] = 'cancelling'
  else
    local mark = redis.call('HGET', KEYS[k], id)
    if mark == 'q' then redis.call('ZADD', KEYS[1], now, run .. ' ' .. id) end
    out[#out + 1] = mark == 'q' and 'cancelling' or mark and mark ~= 'x' and mark or 'unknown'
  end
end
return out
