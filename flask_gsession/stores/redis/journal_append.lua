-- Adds only the entries, which follow. KEYS: consumers.
-- A full server refuses a script that begins with a write that adds something, but not one that
-- begins with a removal. Ends and sweeps free memory, so they must not fail.
redis.call('HDEL', KEYS[1], '')
return 'K'
