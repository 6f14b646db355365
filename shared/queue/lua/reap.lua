-- Puts requests with an expired lease back at the front of their queues; fails requests that crashed workers too often
-- while they ran alone. Workers need no lock to reap: the first worker removes the lease, and others don't find it.
-- ARGV: base, maximum number of requests in one call, number of crashes alone after which a request fails, ttl (s) of
--       a failed job, event (a format with one %d for its number), exception text as in RQ's results, the worker that
--       reaps.
-- Returns {ids of requeued requests, ids of failed requests, unreadable}.
local base, max_crashes_alone, failure_ttl, event = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

local function read_owner(id)
  return guarded(id, base, nil, get_owner, id) or {}
end

-- Returns how many requests a worker held when it was last alive, and true if one of them was isolated. The number is
-- the worker's leases plus the requests reaped from it in the last minute. RQ's record of the worker's jobs can't be
-- used: it remains after a kill, but is deleted after an exception.
local held = {}
local function held_when_alive(worker)
  if not held[worker] then
    local num_reaped, had_isolated = unpack(redis.call('HMGET', reaped_key(worker), 'num', 'lone'))
    held[worker] = { num = to_number(num_reaped, 0), had_isolated = had_isolated }
  end
  return held[worker]
end

-- Counts a crash against a request. Returns how often the request crashed a worker while it ran alone; false if it ran
-- beside other requests this time.
local function count_crash(id, owner)
  local reaped, others = reaped_key(owner.worker), held_when_alive(owner.worker)
  increment(reaped, 'num')
  if owner.alone then redis.call('HSET', reaped, 'lone', 1) end
  redis.call('EXPIRE', reaped, 60)
  if owner.alone or others.num == 1 then return increment(job_key(id), 'crashes_alone') end
  -- If another request was isolated, no step of this request ran: it did not cause the crash.
  if not others.had_isolated then increment(job_key(id), 'suspect') end
  return false
end

local requeued, dead = {}, {}
local function reap(id, owner)
  if not owner.claim_id then
    -- The owner hash was deleted by another program. If the request was running, it is put back on its queue.
    redis.call('ZREM', leases_key(base), id)
    local status, queue = unpack(redis.call('HMGET', job_key(id), 'status', 'origin'))
    if status == 'started' then requeue(id, nobody(base, queue)) end
  elseif redis.call('EXISTS', job_key(id)) == 0 or owner.aborted then
    requeue(id, owner)
  else
    local num_alone = count_crash(id, owner)
    if num_alone and num_alone >= max_crashes_alone then
      finish_ownerless(id, owner, event, { 'failed', '{}', '', ARGV[6], failure_ttl })
      dead[#dead + 1] = id
    else
      requeue(id, owner)
      requeued[#requeued + 1] = id
    end
  end
end

if not holds_lease(base, ARGV[7]) then return { {}, {}, unreadable } end
local expired = redis.call('ZRANGEBYSCORE', leases_key(base), '-inf', now_ms, 'LIMIT', 0, tonumber(ARGV[2]))
if #expired == 0 then return { {}, {}, unreadable } end

local owners = {}
for _, id in ipairs(redis.call('ZRANGE', leases_key(base), 0, -1)) do
  owners[id] = read_owner(id)
  if owners[id].worker then
    local others = held_when_alive(owners[id].worker)
    others.num, others.had_isolated = others.num + 1, others.had_isolated or owners[id].alone
  end
end
for _, id in ipairs(expired) do
  guarded(id, base, nil, reap, id, owners[id])
end
return { requeued, dead, unreadable }
