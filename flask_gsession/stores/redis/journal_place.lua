-- Put a session into the due index. KEYS: bucket. ARGV: when it is due, key.
redis.call('ZREM', KEYS[1], '')  -- so that a full server accepts the write: see journal_append
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
return 'K'
