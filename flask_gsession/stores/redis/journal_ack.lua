-- Move the number of a consumer, only up. KEYS: consumers. ARGV: name, number.
redis.call('HDEL', KEYS[1], '')  -- so that a full server lets it write: see journal_append
local there = redis.call('HGET', KEYS[1], ARGV[1])
if not there or tonumber(there) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
return 'K'
