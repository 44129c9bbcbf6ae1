-- End a session in a cluster: put a marker with its last entries in its place, in its own slot.
-- KEYS: record; its lease, if it must be held.
-- ARGV: expected version (8 bytes), now in ms, marker, its life in ms, required owner of the lease,
--       1 if the session must have expired, else it must be live.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
if #head < 31 then return 'D' end
if head:sub(1, 9) == ARGV[3]:sub(1, 9) then return 'K' end
if head:byte(1) ~= 1 then return 'D' end
local expired = tonumber(ARGV[2]) >= struct.unpack('>I6', head, 16)
if expired ~= (ARGV[6] == '1') then return expired and 'D' or 'S' end
if KEYS[2] then
  local lease = redis.pcall('GET', KEYS[2]) or ''
  if type(lease) == 'table' then
    if not lease.err:find('WRONGTYPE', 1, true) then return lease end
    lease = ''  -- junk
  end
  local owner, till = lease:match('^(%S*) (%d+)')
  if owner ~= ARGV[5] or tonumber(ARGV[2]) >= tonumber(till) then return 'L' end
end
if head:sub(2, 9) ~= ARGV[1] then return 'S' end
redis.call('DEL', KEYS[1])  -- so that a full server accepts the write: see journal_append
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 'K'
