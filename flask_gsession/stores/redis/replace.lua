-- Rotate: move the record to the new key, and replace the old one by a pointer or delete it. Ends
-- the lease.
-- KEYS: old, new, lease of the old.
-- ARGV: expected version (8 bytes), new value, its life in ms, now in ms, pointer (empty: none), its
--       life in ms, required owner of the lease (empty: none), prefix of the channels, idle expiry
--       of the new value if it must not be earlier than the old one's (else empty).
-- If the old idle expiry is later, returns "R" with it and does nothing.
local mine = ARGV[2]:sub(2, 9)
local taken = redis.call('GETRANGE', KEYS[2], 0, 30)
if #taken > 0 then
  if taken:sub(2, 9) == mine then return 'K' .. mine end
  return 'T'
end
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 or head:byte(1) ~= 1 then return 'G' end
local idle = struct.unpack('>I6', head, 16)
if tonumber(ARGV[4]) >= idle then return 'G' end
local lease = redis.pcall('GET', KEYS[3])
if type(lease) == 'table' then
  if not lease.err:find('WRONGTYPE', 1, true) then return lease end
  lease = ''  -- junk
end
if ARGV[7] ~= '' then
  local owner, till = (lease or ' 0\n'):match('^(%S*) (%d+)')
  if owner ~= ARGV[7] or tonumber(ARGV[4]) >= tonumber(till) then return 'L' end
end
if head:sub(2, 9) ~= ARGV[1] then return 'S' end
if idle > (tonumber(ARGV[9]) or idle) then return 'R' .. string.format('%.0f ', idle) .. mine end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
if ARGV[5] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[6])
end
if lease then
  redis.call('DEL', KEYS[3])
  for who, where in lease:gmatch('\n(%S+) %d+ (%S+)') do redis.call('PUBLISH', ARGV[8] .. where, who) end
end
return 'K' .. mine
