-- Puts a request back on its queue that a worker of another class has taken; see `take_back` in waiting.lua.
-- ARGV: id. Returns 'queued', 'taken' or 'other'.
return guarded(ARGV[1], '', nil, take_back, ARGV[1]) or 'other'
