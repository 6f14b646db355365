-- Keys that nothing but Python reads, set aside if they have a type that they should not have.
-- ARGV: type, key, type, key, ... Returns what was set aside.
for i = 1, #ARGV, 2 do shared_key(ARGV[i], ARGV[i + 1]) end
return unreadable
