-- Create a session and the mark that names it, unless there is a mark.
-- KEYS: session, mark. ARGV: session, its life in ms, mark, its life in ms, version of the mark.
local there = redis.call('GET', KEYS[2])
if there and there ~= ARGV[3] then return 'P' .. there end
if not there then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
end
return 'K' .. ARGV[5]
