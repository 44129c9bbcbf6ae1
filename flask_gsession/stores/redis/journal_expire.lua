-- Remove an expired session if it has this version; 0: any version.
-- KEYS: record, its lease, its due index. ARGV: version (8 bytes), now in ms, key.
local head = redis.pcall('GETRANGE', KEYS[1], 0, 30)
if type(head) == 'table' then head = '?' end  -- junk of another type
if not redis.call('ZSCORE', KEYS[3], ARGV[3]) then return 'N' end
if #head == 31 and head:byte(1) == 1 then
  local due = struct.unpack('>I6', head, 16)
  if tonumber(ARGV[2]) < due then
    redis.call('ZADD', KEYS[3], string.format('%.0f', due), ARGV[3])
    return 'N'
  end
end
if ARGV[1] ~= '\0\0\0\0\0\0\0\0' and head:sub(2, 9) ~= ARGV[1] then
  if #head == 0 then redis.call('ZREM', KEYS[3], ARGV[3]) end
  return 'N'
end
redis.call('DEL', KEYS[1], KEYS[2])
return 'K'
