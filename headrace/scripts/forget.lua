#!lua flags=allow-oom
-- Forget one page of a run's jobs, so that its rows can be submitted again.
-- KEYS: 1 marks, 2 counters, 3 runs, 4 cancels
-- ARGV: 1 run, 2 cursor, 3 count
-- Returns the next cursor; with "0" the run is forgotten.
-- Keeps: a job that is still queued is marked "x", so that its end, whenever it comes, leaves no trace
-- (unless its id was submitted again by then: whichever of the two ends first is the job's end).
local page = redis.call('HSCAN', KEYS[1], ARGV[2], 'COUNT', ARGV[3])
for i = 1, #page[2], 2 do
  local id, mark = page[2][i], page[2][i + 1]
  if mark == 'q' then
    redis.call('HSET', KEYS[1], id, 'x')
    redis.call('ZREM', KEYS[4], ARGV[1] .. ' ' .. id)
  elseif mark ~= 'x' then
    redis.call('HDEL', KEYS[1], id)
  end
end
if page[1] == '0' then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
end
return page[1]
