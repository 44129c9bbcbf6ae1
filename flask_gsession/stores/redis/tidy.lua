-- Give a key that has no expiry one, or remove it. Every write of ours sets an expiry, so that this
-- touches nothing that was written since it was looked at.
-- KEYS: key. ARGV: the life it is to have in ms (0: none).
if redis.call('PTTL', KEYS[1]) ~= -1 then return 'N' end
if ARGV[1] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return 'K'
