-- Give a key that has no expiry one, or remove it; unless it was written since it was looked at.
-- KEYS: key. ARGV: its first 31 bytes as they were seen, the life it is to have in ms (0: none).
if redis.call('PTTL', KEYS[1]) ~= -1 then return 'N' end
if redis.call('GETRANGE', KEYS[1], 0, 30) ~= ARGV[1] then return 'N' end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 'K'
