-- Renames keys of a wrong type, for keys that no other script reads.
-- ARGV: type, key, type, key, ... Returns the renamed keys with the reasons.
for i = 1, #ARGV, 2 do shared_key(ARGV[i], ARGV[i + 1]) end
return unreadable
