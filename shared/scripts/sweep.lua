-- Queues that were filled or emptied behind our back (`rq requeue`, `rq empty`, a dashboard) are noticed, and RQ's
-- registries forget the jobs that have expired.
-- ARGV: base, then the queues of the base. Returns {how many of them wait, unreadable}.
local base = ARGV[1]
local count = 0

-- A request that somebody runs and that has no lease, since it was removed from outside: it gets one that has run out.
-- Its worker renews it; if that is dead, the request is reaped.
local function lease_again(composite)
  local id, execution = composite:match('^(.*):(.*)$')
  if not id or redis.call('ZSCORE', leases_key(base), id) then return end
  local owner = guarded(id, base, nil, get_owner, id)
  if owner and owner.execution == execution then redis.call('ZADD', leases_key(base), now_ms, id) end
end

for i = 2, #ARGV do
  local queue = ARGV[i]
  local was_waiting = redis.call('ZSCORE', waiting_key(base), queue)
  for _, name in ipairs({ 'finished', 'failed', 'canceled' }) do
    redis.call('ZREMRANGEBYSCORE', registry_key(name, queue), '-inf', math.floor(now_ms / 1000))
  end
  for _, composite in ipairs(redis.call('ZRANGE', registry_key('wip', queue), 0, -1)) do lease_again(composite) end
  update_waiting(base, queue)
  if redis.call('ZSCORE', waiting_key(base), queue) then
    count = count + 1
    if not was_waiting then ring(base) end
  end
end
return { count, unreadable }
