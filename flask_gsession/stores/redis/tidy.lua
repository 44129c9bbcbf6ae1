-- Set an expiry on a key without one, or remove the key. All our writes set an expiry, so this can't
-- affect a key that was written since the scan.
-- KEYS: key. ARGV: its new life in ms (0: remove it).
if redis.call('PTTL', KEYS[1]) ~= -1 then return 'N' end
if ARGV[1] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 'K'
