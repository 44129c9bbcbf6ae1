-- Create a session.
-- KEYS: record. ARGV: value, its life in ms.
local there = redis.call('GETRANGE', KEYS[1], 0, 30)
local mine = ARGV[1]:sub(2, 9)
if #there > 0 then
  if there:sub(2, 9) == mine then return 'K' .. mine end
  return 'T'
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 'K' .. mine
