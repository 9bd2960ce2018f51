#!lua flags=allow-oom
-- End jobs: completion out, mark set, counters moved, job entry gone; all or nothing for each job.
-- allow-oom: a full server must still be drained.
-- KEYS: 1 attempts, 2 runs, 3 cancels, 4 dead letters, 5 crashes, then S job streams, then for each of R runs:
--       marks, counters, then T result streams, then kept completions
-- ARGV: 1 group, 2 consumer, 3 field, 4 retention seconds, 5 seconds to keep answers for applications,
--       6 S, 7 R, 8 T, then R run names, then for each job: stream (1-S), entry id, run (1-R), job id, status,
--       prompt tokens, cached tokens, completion tokens, result stream (1-T), kept completion (0: none), dead
--       letter (JSON of what is known, '' for none), payload
-- Returns one word a job: "done"; "fenced" (the lease is another's now); "duplicate" (ended before, by this
--       very call if its reply was lost); "forgotten" (its run was forgotten while it was queued); "cancelled"
--       (it or its run was cancelled meanwhile: finish it with that status; nothing has changed).
-- Keeps: one completion a job, and only from the consumer that holds its lease. A job without a mark was
--       written by hand, or its run's marks expired: it is counted as submitted here.
local group, consumer, field, ttl, keep_s = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local S, R, T = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local runs_at, results_at = 5 + S, 5 + S + 2 * R
local cancels = redis.call('ZCARD', KEYS[3]) > 0
local out, gone, counts, touched, expiring = {}, {}, {}, {}, {}
local function count(r, name, by)
  counts[r] = counts[r] or {}
  if by ~= 0 then counts[r][name] = (counts[r][name] or 0) + by end
end
-- The job's bytes, where it came from and what happened to it, for whoever looks into it.
local function bury(stream, entry, letter)
  local fields, raw = {}, false
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  for f = 1, found and #found[2] or 0, 2 do fields[found[2][f]] = found[2][f + 1] end
  if fields['r'] then raw = redis.call('GET', stream .. '#' .. entry) end
  local tries = redis.call('HGET', KEYS[1], stream .. ' ' .. entry) or ''
  local id = string.match(tries, '(%d+-%d+)$')
  local crash = id and redis.call('XRANGE', KEYS[5], id, id)[1]
  redis.call('XADD', KEYS[4], '*', field, raw or fields[field] or '', 'i', letter, 'a', tries,
    'e', crash and crash[2][2] or '', 's', stream .. ' ' .. entry)
end
for i = 9 + R, #ARGV, 12 do
  local s, entry, r, id = tonumber(ARGV[i]), ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
  local marks = KEYS[runs_at + 2 * r - 1]
  local mark = redis.call('HGET', marks, id)
  local lease = redis.pcall('XPENDING', KEYS[5 + s], group, entry, entry, 1, consumer)
  local holds = not lease.err and #lease == 1
  if mark and mark ~= 'q' and mark ~= 'x' then
    out[#out + 1] = 'duplicate'
  elseif not holds then
    out[#out + 1] = 'fenced'
  elseif mark == 'x' then
    redis.call('HDEL', marks, id)
    out[#out + 1] = 'forgotten'
  elseif cancels and ARGV[i + 4] ~= 'cancelled' and (redis.call('ZSCORE', KEYS[3], ARGV[8 + r])
      or redis.call('ZSCORE', KEYS[3], ARGV[8 + r] .. ' ' .. id)) then
    out[#out + 1] = 'cancelled'
    holds = false
  else
    local status, t, kept = ARGV[i + 4], tonumber(ARGV[i + 8]), tonumber(ARGV[i + 9])
    redis.call('XADD', KEYS[results_at + t], '*', field, ARGV[i + 11])
    if ARGV[i + 10] ~= '' then bury(KEYS[5 + s], entry, ARGV[i + 10]) end
    if cancels then redis.call('ZREM', KEYS[3], ARGV[8 + r] .. ' ' .. id) end
    touched[t] = true
    redis.call('HSET', marks, id, status)
    if not mark then count(r, 'submitted', 1) end
    count(r, status, 1)
    count(r, 'prompt_tokens', tonumber(ARGV[i + 5]))
    count(r, 'cached_tokens', tonumber(ARGV[i + 6]))
    count(r, 'completion_tokens', tonumber(ARGV[i + 7]))
    if kept > 0 then
      redis.call('SET', KEYS[results_at + T + kept], ARGV[i + 11], 'EX', keep_s)
      expiring[t] = true
    end
    out[#out + 1] = 'done'
  end
  if holds then
    gone[s] = gone[s] or {}
    table.insert(gone[s], entry)
  end
end
for s, entries in pairs(gone) do
  local names, payloads = {}, {}
  for j, entry in ipairs(entries) do
    names[j], payloads[j] = KEYS[5 + s] .. ' ' .. entry, KEYS[5 + s] .. '#' .. entry
  end
  redis.call('XACK', KEYS[5 + s], group, unpack(entries))
  redis.call('XDEL', KEYS[5 + s], unpack(entries))
  redis.call('HDEL', KEYS[1], unpack(names))
  redis.call('DEL', unpack(payloads))
end
local now = redis.call('TIME')[1]
for r, names in pairs(counts) do
  for name, by in pairs(names) do redis.call('HINCRBY', KEYS[runs_at + 2 * r], name, by) end
  redis.call('EXPIRE', KEYS[runs_at + 2 * r - 1], ttl)
  redis.call('EXPIRE', KEYS[runs_at + 2 * r], ttl)
  redis.call('ZADD', KEYS[2], now, ARGV[8 + r])
end
for t in pairs(touched) do -- one that a sink had emptied was about to expire
  if expiring[t] then
    redis.call('EXPIRE', KEYS[results_at + t], keep_s)
  else
    redis.call('PERSIST', KEYS[results_at + t])
  end
end
return out
