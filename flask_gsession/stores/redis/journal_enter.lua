-- Follows a script that writes a session, as the function "write". If the write succeeds, updates
-- the due index, and adds entries to the journal.
-- KEYS: the write's keys; due index of the key to enter; due index of the key to remove; stream.
-- ARGV: the write's arguments; key to enter in the due index (empty: none); number of the argument
--       that begins with the header of its record; key to remove (empty: none); first number of an
--       empty journal; maximum number of entries; the entries; how many they are.
local count = tonumber(ARGV[#ARGV])
local own = #ARGV - count - 6
local reply = write({unpack(KEYS, 1, #KEYS - 3)}, {unpack(ARGV, 1, own)})
if reply:sub(1, 1) ~= 'K' then return reply end
if ARGV[own + 1] ~= '' then
  local due = struct.unpack('>I6', ARGV[tonumber(ARGV[own + 2])], 16)
  redis.call('ZADD', KEYS[#KEYS - 2], string.format('%.0f', due), ARGV[own + 1])
end
if ARGV[own + 3] ~= '' then redis.call('ZREM', KEYS[#KEYS - 1], ARGV[own + 3]) end
if count > 0 then
  local stream = KEYS[#KEYS]
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  local number = last and tonumber(last[1]:match('^%d+')) + 1 or tonumber(ARGV[own + 4])
  for place = own + 6, #ARGV - 1 do
    redis.call('XADD', stream, 'MAXLEN', '~', ARGV[own + 5],
      string.format('%.0f-0', number), 'e', ARGV[place])
    number = number + 1
  end
end
return reply
