-- Remove the marker of an ended session, once its entries are in the journal.
-- KEYS: record. ARGV: kind and version of the marker (9 bytes).
if redis.call('GETRANGE', KEYS[1], 0, 8) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 'K'
