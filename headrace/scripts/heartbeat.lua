#!lua flags=allow-oom
-- Report an engine's state, stamped with the server's clock.
-- KEYS: 1 engines
-- ARGV: 1 engine boot id, 2 JSON of the state
-- Returns the server's time, in unix seconds.
local t = redis.call('TIME')
local at = string.format('%d.%06d', t[1], t[2])
redis.call('HSET', KEYS[1], ARGV[1], '{"at":' .. at .. ',"state":' .. ARGV[2] .. '}')
return at
