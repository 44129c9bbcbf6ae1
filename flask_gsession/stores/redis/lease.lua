-- The lease of a session, and the queue for it: one text, a line for who holds it until when, and
-- for how long he asked (ms), and one for each who waits: who, when he asked last, and where he is to be called (ms since 1970).
-- KEYS: lease, and to acquire it the record, unless that was seen to live before.
-- ARGV: acquire | extend | release | end, owner, now in ms, the life of a waiter in ms, what the
--       channels begin with; to acquire or extend: lease in ms; to acquire: the most waiters, the
--       channel of this one.
-- Answers with how it went, the owner, and to "W" for how many ms to wait.
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
-- Junk is no lease: it is replaced.
if not owner then owner, till, length, lines = '', 0, 0, '' end
till, length = tonumber(till), math.min(tonumber(length), 3600000)
-- Such a late end comes from a clock that was far ahead, or has been set back.
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
  -- Alone where nothing was there to release: a repeat cannot tell whether it did it before.
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
