-- Extend the idle expiry of a live record of this version. Never moves it back.
-- KEYS: record. ARGV: header with the later expiry, its life in ms, now in ms.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 or head:sub(1, 9) ~= ARGV[1]:sub(1, 9) then return 'G' end
local idle = struct.unpack('>I6', head, 16)
if tonumber(ARGV[3]) >= idle then return 'G' end
if idle < struct.unpack('>I6', ARGV[1], 16) then
  redis.call('SETRANGE', KEYS[1], 0, ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 'K'
