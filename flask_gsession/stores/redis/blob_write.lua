-- Add a frame to a blob (a string), and extend its expiry. Never stores it without an expiry.
-- KEYS: blob. ARGV: offset of the frame, the frame, the blob's life in ms.
local start = tonumber(ARGV[1])
if start > 0 and redis.call('GETRANGE', KEYS[1], start - 1, start - 1) == '' then return 'G' end
redis.call('SETRANGE', KEYS[1], start, ARGV[2])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 'K'
