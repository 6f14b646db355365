-- Replaces an entry of the registry, unless it has changed since the caller read it.
-- ARGV: model, the entry as the caller read it, the new entry. Returns 1 if the entry was replaced, else 0.
local models = shared_key('hash', OURS .. ':models')
if redis.call('HGET', models, ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', models, ARGV[1], ARGV[3])
return 1
