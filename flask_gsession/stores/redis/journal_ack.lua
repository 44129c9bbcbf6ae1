-- Move the number of a consumer, only up. KEYS: consumers. ARGV: name, number.
local there = redis.call('HGET', KEYS[1], ARGV[1])
if not there or tonumber(there) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
return 'K'
