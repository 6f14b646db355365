-- Renames those of the given keys that have a wrong type. Other scripts rename such keys when they read them.
-- ARGV: type, key, type, key, ... Returns {renamed key, reason} pairs.
for i = 1, #ARGV, 2 do shared_key(ARGV[i], ARGV[i + 1]) end
return unreadable
