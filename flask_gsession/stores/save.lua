-- Replace a live record of the expected version; never create one.
-- KEYS: record. ARGV: expected version (8 bytes), new value, its life in ms, now in ms.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 or head:byte(1) ~= 1 then return 'G' end
local version = head:sub(2, 9)
local mine = ARGV[2]:sub(2, 9)
if version == mine then return 'K' .. mine end
if tonumber(ARGV[4]) >= struct.unpack('>I6', head, 16) then return 'G' end
if version ~= ARGV[1] then return 'S' end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 'K' .. mine
