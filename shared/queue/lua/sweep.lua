-- Repairs `waiting` and the index of queues that were changed with RQ's tools (`rq requeue`, `rq empty`, a dashboard),
-- removes expired jobs from RQ's registries, ends overdue requests at the front of a queue, puts back requests that a stock
-- worker took and did not end, and renames keys of a wrong type.
-- ARGV: base, then the queues of the base. Returns {number of these queues with waiting requests, unreadable}.
local base = ARGV[1]
local MAX_NUM_ENDED = 100
local count = 0

local STUCK_MS = 5000
-- Age at which the note of a stuck request is from an earlier time that it was taken, because sweeps come more often.
local OLD_NOTE_MS = 30000

-- Looks at a request in one of RQ's lists where only a stock worker puts it, for the milliseconds until it has ended the
-- job. If the request has stood there for STUCK_MS, that worker was stopped, and the request goes back on its queue.
-- Returns true if its entry in the list has no use any more. Jobs of other programs keep theirs.
local function settle(id, queue)
  local status, request, since_ms = unpack(redis.call('HMGET', job_key(id), 'status', 'request', 'stuck_since_ms'))
  if not request then return not status end
  if status ~= 'queued' and taken_status(id) ~= 'started' then return true end
  local stuck_ms = now_ms - to_number(since_ms, 0)
  if stuck_ms > OLD_NOTE_MS then redis.call('HSET', job_key(id), 'stuck_since_ms', now_ms) end
  if stuck_ms > OLD_NOTE_MS or stuck_ms < STUCK_MS then return false end
  put_back(id, queue)
  return true
end

-- Repairs a claim whose lease was deleted or garbled: the request gets an expired lease, which the request's worker
-- renews, or, if that worker is dead, another worker requeues the request (reap.lua). An entry without an owner is a
-- stock worker's, or its owner was lost.
local function mend_entry(queue, composite)
  local id, claim_id = composite:match('^(.*):(.*)$')
  local owner = id and guarded(id, base, nil, get_owner, id)
  if owner and owner.claim_id == claim_id then
    if not redis.call('ZSCORE', leases_key(base), id) then redis.call('ZADD', leases_key(base), now_ms, id) end
  elseif not id or guarded(id, base, nil, settle, id, queue) then
    redis.call('ZREM', registry_key('wip', queue), composite)
  end
end

-- Ends overdue requests at the front of a queue. claim.lua ends overdue requests too, but full workers do not claim.
local function end_overdue_heads(queue)
  for _, id in ipairs(redis.call('LRANGE', queue_key(queue), 0, MAX_NUM_ENDED - 1)) do
    if not guarded(id, base, queue, end_overdue, id, base, queue) then return end
  end
end

-- Looks at the requests that stock workers have popped and not begun. They stand in the list for good if such a worker is
-- stopped before it has marked their jobs as started.
local function settle_all(queue)
  for _, id in ipairs(redis.call('LRANGE', intermediate_key(queue), 0, MAX_NUM_ENDED - 1)) do
    if guarded(id, base, nil, settle, id, queue) then redis.call('LREM', intermediate_key(queue), 0, id) end
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
  settle_all(queue)
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
