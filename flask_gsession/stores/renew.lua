-- Move the idle expiry of a record that nobody wrote since it was loaded.
-- KEYS: record. ARGV: header as loaded, header with the later expiry, its life in ms.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if head ~= ARGV[1] and head ~= ARGV[2] then return 'G' end
redis.call('SETRANGE', KEYS[1], 0, ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 'K'
