-- Add a frame to a blob, one string, and keep that for so long at least. Never without an expiry.
-- KEYS: blob. ARGV: where the frame begins, the frame, the blob's life in ms.
local start = tonumber(ARGV[1])
if start > 0 and redis.call('GETRANGE', KEYS[1], start - 1, start - 1) == '' then return 'G' end
redis.call('SETRANGE', KEYS[1], start, ARGV[2])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 'K'
