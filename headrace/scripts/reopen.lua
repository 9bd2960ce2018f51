#!lua flags=allow-oom
-- Take back how a job ended, so that it can be submitted again.
-- KEYS: 1 marks, 2 counters
-- ARGV: 1 job id
-- Returns the status that it had ended with, "q" where it is queued again already, or "".
-- Keeps: a run's counters add up: a job taken back counts as never submitted, until it is.
local mark = redis.call('HGET', KEYS[1], ARGV[1])
if mark and mark ~= 'q' and mark ~= 'x' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HINCRBY', KEYS[2], mark, -1)
  redis.call('HINCRBY', KEYS[2], 'submitted', -1)
end
return mark or ''
