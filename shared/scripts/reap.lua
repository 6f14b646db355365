-- Requests whose owner stopped renewing go back to the front of their queues. Needs no lock: the first reaper
-- takes a lease away, the second finds none.
-- ARGV: base, most requests in one call. Returns their ids.
local base = ARGV[1]
local expired = redis.call('ZRANGEBYSCORE', leases_key(base), '-inf', now_ms, 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(expired) do
  local owner = get_owner(id)
  if owner.execution then
    requeue(id, owner)
  else
    redis.call('ZREM', leases_key(base), id)
  end
end
return expired
