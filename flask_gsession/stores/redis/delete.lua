-- Delete a record and its lease. Returns the record unless a version is expected. A live pointer is
-- returned and stays, since its successor must be deleted first.
-- KEYS: record; its lease, to end it too.
-- ARGV: expected version (8 bytes, empty: any), now in ms, 1 to delete a pointer, required owner of
--       the lease (empty: none), prefix of the channels.
local head = redis.call('GETRANGE', KEYS[1], 0, 30)
local unexpired = #head == 31 and tonumber(ARGV[2]) < struct.unpack('>I6', head, 16)
local live = unexpired and head:byte(1) == 1
-- A rotation in a cluster leaves this marker for its own repeat; it expires.
if head:byte(1) == 2 and redis.call('GETRANGE', KEYS[1], 31, 31) == ' ' then return 'N' end
local lease = KEYS[2] and redis.pcall('GET', KEYS[2])
if type(lease) == 'table' then
  if not lease.err:find('WRONGTYPE', 1, true) then return lease end
  lease = ''  -- junk
end
if ARGV[1] ~= '' then
  if not live then
    if unexpired then return 'G' end
    return 'D'
  end
  if ARGV[4] ~= '' then
    local owner, till = (lease or ' 0\n'):match('^(%S*) (%d+)')
    if owner ~= ARGV[4] or tonumber(ARGV[2]) >= tonumber(till) then return 'L' end
  end
  if head:sub(2, 9) ~= ARGV[1] then return 'S' end
elseif unexpired and head:byte(1) == 2 and ARGV[3] ~= '1' then
  return 'P' .. redis.call('GET', KEYS[1])
end
local record = live and ARGV[1] == '' and redis.call('GET', KEYS[1]) or ''
redis.call('DEL', KEYS[1])
if lease then
  redis.call('DEL', KEYS[2])
  for who, where in lease:gmatch('\n(%S+) %d+ (%S+)') do redis.call('PUBLISH', ARGV[5] .. where, who) end
end
if live then return 'K' .. record end
return 'N'
