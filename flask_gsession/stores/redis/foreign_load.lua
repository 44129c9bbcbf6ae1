-- A string of another package, how long it lives, and a record of ours beside it.
-- KEYS: the string; the record, if it is asked for.
local value, life = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
return {KEYS[1], value, life, KEYS[2] and redis.call('GET', KEYS[2])}
