-- Put what is held back on the shelf, and close the order. KEYS: left, held, order. ARGV: number.
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HGET', KEYS[3], '#state') ~= 'held' then return end
local fields = redis.call('HGETALL', KEYS[3])
for i = 1, #fields, 2 do
  if fields[i] ~= '#state' then redis.call('HINCRBY', KEYS[1], fields[i], fields[i + 1]) end
end
redis.call('HSET', KEYS[3], '#state', 'closed')
