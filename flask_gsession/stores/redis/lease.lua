-- The lease of a session and its queue, as text. First line: owner, end (ms since 1970), length
-- (ms). One line for each waiter: owner, last attempt (ms since 1970), channel.
-- KEYS: lease; to acquire it also the record, unless the caller knows that it is live.
-- ARGV: acquire | extend | release | end, owner, now in ms, life of a waiter in ms, prefix of the
--       channels; to acquire or extend: lease in ms; to acquire: maximum number of waiters, channel
--       of this one.
-- Returns a status letter and the owner; "W" also has the number of ms to wait.
local operation, me, now, life = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if KEYS[2] then
  local head = redis.call('GETRANGE', KEYS[2], 0, 30)
  if #head < 31 or head:byte(1) ~= 1 or now >= struct.unpack('>I6', head, 16) then return 'G' end
end
local stored = redis.pcall('GET', KEYS[1]) or ' 0 0\n'
if type(stored) == 'table' then
  if not stored.err:find('WRONGTYPE', 1, true) then return stored end
  stored = ''
end
local owner, till, length, lines = stored:match('^(%S*) (%d+) (%d+)\n(.*)$')
-- Replace a malformed lease.
if not owner then owner, till, length, lines = '', 0, 0, '' end
till, length = tonumber(till), math.min(tonumber(length), 3600000)
-- An end this late comes from a clock that was far ahead, or was set back.
local free = now >= till or till - now > 2 * length
local waiters, place = {}, nil
for who, seen, where in lines:gmatch('(%S+) (%d+) (%S+)\n') do
  if who == me or math.abs(now - seen) < life then
    waiters[#waiters + 1] = {who, tonumber(seen), where}
    if who == me then place = #waiters end
  end
end
if operation == 'end' then
  redis.call('DEL', KEYS[1])
  for _, waiter in ipairs(waiters) do redis.call('PUBLISH', ARGV[5] .. waiter[3], waiter[1]) end
  return 'N' .. me
end
local held = owner == me and now < till
local answer = held and 'K' or 'N'

if operation == 'extend' then
  if not held then return answer .. me end
  till, length = now + ARGV[6], tonumber(ARGV[6])
elseif operation == 'release' then
  -- "L" without an owner: nothing to release. A repeat can't know whether it was released before.
  if owner ~= me and not place then return 'L' end
  if owner == me then owner, till, length, free = '', 0, 0, true end
  if place then table.remove(waiters, place) end
  if free and waiters[1] then
    redis.call('PUBLISH', ARGV[5] .. waiters[1][3], waiters[1][1])
  end
else
  local first = waiters[1] and waiters[1][1] or me
  if held or (free and first == me) then
    if place then table.remove(waiters, place) end
    owner, till, length, answer = me, now + ARGV[6], tonumber(ARGV[6]), 'K'
  else
    if not place then
      if #waiters >= tonumber(ARGV[7]) then return 'F' end
      place = #waiters + 1
    end
    waiters[place] = {me, now, ARGV[8]}
    local at = free and waiters[1][2] + life or till
    answer = 'W' .. string.format('%.0f ', at - now)
  end
end

if owner == '' and #waiters == 0 then
  redis.call('DEL', KEYS[1])
else
  local text = {string.format('%s %.0f %.0f\n', owner, till, length)}
  for _, waiter in ipairs(waiters) do
    text[#text + 1] = string.format('%s %.0f %s\n', waiter[1], waiter[2], waiter[3])
  end
  local left = string.format('%.0f', math.max(math.min(till - now, 2 * length), life))
  redis.call('SET', KEYS[1], table.concat(text), 'PX', left)
end
return answer .. me
