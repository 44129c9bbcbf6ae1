-- Make a hold a sale, if it has not run out. KEYS: left, held, order. ARGV: number, now.
local state = redis.call('HGET', KEYS[3], '#state')
if state ~= 'held' then return state or 'closed' end
if tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1])) <= tonumber(ARGV[2]) then return 'closed' end
redis.call('HSET', KEYS[3], '#state', 'sold')
redis.call('ZREM', KEYS[2], ARGV[1])
return 'sold'
