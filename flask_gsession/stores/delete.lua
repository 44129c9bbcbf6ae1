-- Delete a record. A live pointer is returned and left where it is: its successor goes first.
-- KEYS: record. ARGV: expected version (8 bytes, empty: any), now in ms, 1 to delete a pointer.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
local unexpired = #head == 31 and tonumber(ARGV[2]) < struct.unpack('>I6', head, 16)
local live = unexpired and head:byte(1) == 1
if ARGV[1] ~= '' then
  if not live then return 'G' end
  if head:sub(2, 9) ~= ARGV[1] then return 'S' end
elseif unexpired and head:byte(1) == 2 and ARGV[3] ~= '1' then
  return 'P' .. redis.call('GET', KEYS[1])
end
redis.call('DEL', KEYS[1])
if live then return 'K' end
return 'N'
