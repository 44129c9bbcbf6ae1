-- Set all lines of an order aside, or none. What it did before it only tells again.
-- KEYS: left, held, order. ARGV: until, seconds to remember the order, number, then SKU and pieces.
-- Answers: "held", "sold" or "closed" with the order's lines, or "short" with what is left.
local function lines_of_order()
  local lines = {}
  local fields = redis.call('HGETALL', KEYS[3])
  for i = 1, #fields, 2 do
    if fields[i] ~= '#state' then
      lines[#lines + 1] = fields[i]
      lines[#lines + 1] = fields[i + 1]
    end
  end
  return lines
end

local state = redis.call('HGET', KEYS[3], '#state')
if state == 'closed' then return {state} end
if state then return {state, unpack(lines_of_order())} end

local short = {}
for i = 4, #ARGV, 2 do
  local left = tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '0')
  if left < tonumber(ARGV[i + 1]) then
    short[#short + 1] = ARGV[i]
    short[#short + 1] = tostring(left)
  end
end
redis.call('HSET', KEYS[3], '#state', #short > 0 and 'closed' or 'held')
redis.call('EXPIRE', KEYS[3], ARGV[2])
if #short > 0 then return {'short', unpack(short)} end

for i = 4, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[1], ARGV[i], -ARGV[i + 1])
  redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1])
end
redis.call('ZADD', KEYS[2], ARGV[1], ARGV[3])
return {'held', unpack(lines_of_order())}
