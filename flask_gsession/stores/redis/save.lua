-- Replace a live record of the expected version. Never creates one.
-- KEYS: record; its lease, if it must be held.
-- ARGV: expected version (8 bytes), new value, its life in ms, now in ms, its idle expiry if it must
--       not be earlier than the stored one (else empty), required owner of the lease.
-- If the stored idle expiry is later, returns "R" with it and does nothing.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 or head:byte(1) ~= 1 then return 'G' end
local version = head:sub(2, 9)
local mine = ARGV[2]:sub(2, 9)
if version == mine then return 'K' .. mine end
local idle = struct.unpack('>I6', head, 16)
if tonumber(ARGV[4]) >= idle then return 'G' end
if KEYS[2] then
  local lease = redis.pcall('GET', KEYS[2]) or ''
  if type(lease) == 'table' then
    if not lease.err:find('WRONGTYPE', 1, true) then return lease end
    lease = ''  -- junk
  end
  local owner, till = lease:match('^(%S*) (%d+)')
  if owner ~= ARGV[6] or tonumber(ARGV[4]) >= tonumber(till) then return 'L' end
end
if version ~= ARGV[1] then return 'S' end
if idle > (tonumber(ARGV[5]) or idle) then return 'R' .. string.format('%.0f ', idle) .. mine end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 'K' .. mine
