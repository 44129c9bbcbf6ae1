-- Raise the number of a consumer. KEYS: consumers. ARGV: name, number.
redis.call('HDEL', KEYS[1], '')  -- so that a full server accepts the write: see journal_append
local there = redis.call('HGET', KEYS[1], ARGV[1])
if not there or tonumber(there) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
return 'K'
