#!lua flags=allow-oom
-- End jobs: completion out, mark set, counters moved, job entry gone; all or nothing for each job.
-- allow-oom: a full server must still be drained.
-- KEYS: 1 attempts, 2 runs, then for each item: job stream, marks, counters, result stream, kept
-- ARGV: 1 group, 2 consumer, 3 field, 4 retention seconds, 5 seconds to keep answers for applications,
--       then for each item: entry id, job id, run, status, prompt tokens, cached tokens,
--       completion tokens, "1" to keep the completion by job id, payload
-- Returns one word an item: "done"; "fenced" (the lease is another's now); "duplicate" (ended before).
-- Keeps: one completion a job, and only from the consumer that holds its lease.
local group, consumer, field, ttl, keep_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local now = redis.call('TIME')[1]
local out = {}
local k = 3
for i = 6, #ARGV, 9 do
  local jobs, marks, run, results, kept = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4]
  k = k + 5
  local entry, id, status = ARGV[i], ARGV[i + 1], ARGV[i + 3]
  local p = redis.pcall('XPENDING', jobs, group, entry, entry, 1, consumer)
  if p.err or #p == 0 then
    out[#out + 1] = 'fenced'
  else
    local mark = redis.call('HGET', marks, id)
    if mark and mark ~= 'q' then
      out[#out + 1] = 'duplicate'
    else
      redis.call('XADD', results, '*', field, ARGV[i + 8])
      if not mark then redis.call('HINCRBY', run, 'submitted', 1) end
      redis.call('HSET', marks, id, status)
      redis.call('HINCRBY', run, status, 1)
      redis.call('HINCRBY', run, 'prompt_tokens', ARGV[i + 4])
      redis.call('HINCRBY', run, 'cached_tokens', ARGV[i + 5])
      redis.call('HINCRBY', run, 'completion_tokens', ARGV[i + 6])
      redis.call('EXPIRE', marks, ttl)
      redis.call('EXPIRE', run, ttl)
      redis.call('ZADD', KEYS[2], now, ARGV[i + 2])
      if ARGV[i + 7] == '1' then
        redis.call('SET', kept, ARGV[i + 8], 'EX', keep_s)
        redis.call('EXPIRE', results, keep_s)
      end
      out[#out + 1] = 'done'
    end
    redis.call('XACK', jobs, group, entry)
    redis.call('XDEL', jobs, entry)
    redis.call('HDEL', KEYS[1], jobs .. ' ' .. entry)
  end
end
return out
