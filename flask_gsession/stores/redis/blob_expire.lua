-- Make existing blobs expire later, or earlier. Leaves blobs that do so already.
-- KEYS: blobs. ARGV: later | earlier, life in ms.
local life = tonumber(ARGV[2])
for _, blob in ipairs(KEYS) do
  local left = redis.call('PTTL', blob)
  if left ~= -2 and left ~= life and (ARGV[1] == 'later') == (left < life) then
    redis.call('PEXPIRE', blob, ARGV[2])
  end
end
return 'K'
