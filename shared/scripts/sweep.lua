-- Queues that were filled or emptied behind our back (`rq requeue`, `rq empty`, a dashboard) are noticed, and RQ's
-- registries forget the jobs that have expired.
-- ARGV: base, then the queues of the base. Returns how many of them wait.
local base = ARGV[1]
local count = 0
for i = 2, #ARGV do
  local queue = ARGV[i]
  local was_waiting = redis.call('ZSCORE', waiting_key(base), queue)
  for _, registry in ipairs({ ':finished:', ':failed:', ':canceled:' }) do
    redis.call('ZREMRANGEBYSCORE', RQ .. registry .. queue, '-inf', math.floor(now_ms / 1000))
  end
  update_waiting(base, queue)
  if redis.call('ZSCORE', waiting_key(base), queue) then
    count = count + 1
    if not was_waiting then ring(base) end
  end
end
return count
