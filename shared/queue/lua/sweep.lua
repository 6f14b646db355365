-- Repairs `waiting` and the index of queues that were changed with RQ's tools (`rq requeue`, `rq empty`, a dashboard),
-- removes expired jobs from RQ's registries, ends overdue requests at the front of a queue, puts back requests that a stock
-- worker took and never began, and renames keys of a wrong type.
-- ARGV: base, then the queues of the base. Returns {number of these queues with waiting requests, unreadable}.
local base = ARGV[1]
local MAX_NUM_ENDED = 100
local count = 0

-- Repairs a claim whose owner or lease was deleted or garbled. If the owner is missing, RQ's entry for the claim is
-- removed. If the lease is missing, the request gets an expired lease: the request's worker renews the lease, or, if
-- that worker is dead, another worker requeues the request (reap.lua).
local function mend_entry(queue, composite)
  local id, claim_id = composite:match('^(.*):(.*)$')
  local owner = id and guarded(id, base, nil, get_owner, id)
  if owner and owner.claim_id == claim_id then
    if not redis.call('ZSCORE', leases_key(base), id) then redis.call('ZADD', leases_key(base), now_ms, id) end
  elseif not id or redis.pcall('HEXISTS', job_key(id), 'request') ~= 0 or redis.call('EXISTS', job_key(id)) == 0 then
    -- If the job has no `request` field, a plain RQ worker is running it, and its entry stays.
    redis.call('ZREM', registry_key('wip', queue), composite)
  end
end

-- Ends overdue requests at the front of a queue. claim.lua ends overdue requests too, but full workers do not claim.
local function end_overdue_heads(queue)
  for _, id in ipairs(redis.call('LRANGE', queue_key(queue), 0, MAX_NUM_ENDED - 1)) do
    if not guarded(id, base, queue, end_overdue, id, base, queue) then return end
  end
end

local STUCK_MS = 5000
-- Age at which the note of a stuck request is from an earlier time that it was taken, because sweeps come more often.
local OLD_NOTE_MS = 30000

-- Puts a request back on its queue if it stands in `list` for STUCK_MS and its job has not begun.
local function put_back_stuck(id, queue, list)
  local status, request, stuck_since_ms = unpack(redis.call('HMGET', job_key(id), 'status', 'request', 'stuck_since_ms'))
  if status ~= 'queued' or not request then return end
  local stuck_ms = now_ms - to_number(stuck_since_ms, 0)
  if stuck_ms > OLD_NOTE_MS then return redis.call('HSET', job_key(id), 'stuck_since_ms', now_ms) end
  if stuck_ms < STUCK_MS then return end
  redis.call('LREM', list, 0, id)
  redis.call('HDEL', job_key(id), 'stuck_since_ms')
  redis.call('LREM', queue_key(queue), 0, id)
  redis.call('LPUSH', queue_key(queue), id)
  add_place(id, queue, make_place(id))
end

-- Puts back requests that a stock worker took and did not begin. It moves their ids to a list beside the queue's, where
-- they stay if it is stopped before it has marked the job as started, which takes milliseconds.
local function put_back_all_stuck(queue)
  local list = shared_key('list', RQ .. ':queue:' .. queue .. ':intermediate')
  for _, id in ipairs(redis.call('LRANGE', list, 0, MAX_NUM_ENDED - 1)) do
    guarded(id, base, queue, put_back_stuck, id, queue, list)
  end
end

-- Renames these two keys if they have a wrong type. No script of a worker reads them, but the worker blocks on the
-- first, and `rq info` reads the second.
doorbell_key(base)
shared_key('set', RQ .. ':queues')

for i = 2, #ARGV do
  local queue = ARGV[i]
  local was_waiting = redis.call('ZSCORE', waiting_key(base), queue)
  for _, name in ipairs({ 'finished', 'failed', 'canceled' }) do
    redis.call('ZREMRANGEBYSCORE', registry_key(name, queue), '-inf', math.floor(now_ms / 1000))
  end
  for _, composite in ipairs(redis.call('ZRANGE', registry_key('wip', queue), 0, -1)) do
    mend_entry(queue, composite)
  end
  put_back_all_stuck(queue)
  if redis.call('LLEN', queue_key(queue)) > 0 then
    end_overdue_heads(queue)
    trim_index(queue)
    mend_index(base, queue)
  end
  update_waiting(base, queue)
  if redis.call('ZSCORE', waiting_key(base), queue) then
    count = count + 1
    if not was_waiting then ring(base) end
  end
end
return { count, unreadable }
