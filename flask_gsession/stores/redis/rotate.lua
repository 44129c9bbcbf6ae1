-- Rotate in a cluster: replace the old record by a pointer to the new one, which is stored already.
-- Ends the lease.
-- KEYS: old; its lease, if it must be held.
-- ARGV: expected version (8 bytes), pointer, its life in ms, now in ms, new version, required owner
--       of the lease (empty: none), prefix of the channels, idle expiry of the new record if it
--       must not be earlier than the old one's (else empty).
-- If the old idle expiry is later, returns "R" with it and does nothing. Returns "N" without a
-- version if the rotation was done before.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 then return 'G' end
if head:sub(1, 9) == ARGV[2]:sub(1, 9) then return 'N' end
local idle = struct.unpack('>I6', head, 16)
if head:byte(1) ~= 1 or tonumber(ARGV[4]) >= idle then return 'G' end
local lease = KEYS[2] and redis.pcall('GET', KEYS[2])
if type(lease) == 'table' then
  if not lease.err:find('WRONGTYPE', 1, true) then return lease end
  lease = ''  -- junk
end
if ARGV[6] ~= '' then
  local owner, till = (lease or ' 0\n'):match('^(%S*) (%d+)')
  if owner ~= ARGV[6] or tonumber(ARGV[4]) >= tonumber(till) then return 'L' end
end
if head:sub(2, 9) ~= ARGV[1] then return 'S' end
if idle > (tonumber(ARGV[8]) or idle) then return 'R' .. string.format('%.0f ', idle) .. ARGV[5] end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if lease then
  redis.call('DEL', KEYS[2])
  for who, where in lease:gmatch('\n(%S+) %d+ (%S+)') do redis.call('PUBLISH', ARGV[7] .. where, who) end
end
return 'K' .. ARGV[5]
