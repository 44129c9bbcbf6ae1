-- Replace a live record of the expected version. Never creates one.
-- KEYS: record; its lease, if it must be held.
-- ARGV: condition, new value, required owner of the lease.
-- Condition: expected version, now in ms, life of the value in ms (8 bytes each), 1 if its idle
-- expiry may be earlier than the stored one (else 0).
-- If the stored idle expiry is later, returns "R" with it and does nothing.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 or head:byte(1) ~= 1 then return 'G' end
local version = head:sub(2, 9)
local mine = ARGV[2]:sub(2, 9)
if version == mine then return 'K' .. mine end
local idle = struct.unpack('>I6', head, 16)
local now, life, shorten = struct.unpack('>I8I8B', ARGV[1], 9)
if now >= idle then return 'G' end
if KEYS[2] then
  local lease = redis.pcall('GET', KEYS[2]) or ''
  if type(lease) == 'table' then
    if not lease.err:find('WRONGTYPE', 1, true) then return lease end
    lease = ''  -- junk
  end
  local owner, till = lease:match('^(%S*) (%d+)')
  if owner ~= ARGV[3] or now >= tonumber(till) then return 'L' end
end
if version ~= ARGV[1]:sub(1, 8) then return 'S' end
if shorten == 0 and idle > struct.unpack('>I6', ARGV[2], 16) then return 'R' .. string.format('%.0f ', idle) .. mine end
redis.call('SET', KEYS[1], ARGV[2], 'PX', string.format('%.0f', life))
return 'K' .. mine
