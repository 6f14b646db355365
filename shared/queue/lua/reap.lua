-- Puts requests with an expired lease back in front of their queues; ends those that crashed their workers alone too
-- often. Needs no lock: the first reaper removes a lease, and the second finds none.
-- ARGV: base, most requests in one call, crashes alone that end a request, ttl (s) of a failed job, event (a format
--       with one %d, its number), exception text as RQ's results have it, the worker that reaps.
-- Returns {ids requeued, ids dead-lettered, unreadable}.
local base, max_crashes_alone, failure_ttl, event = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

local function read_owner(id)
  return guarded(id, base, nil, get_owner, id) or {}
end

-- For each worker, the number of requests that it held when it was last alive, with those that were reaped from it
-- lately, and true if one of them was isolated. Leases are counted, because RQ's own record of a worker's jobs is gone
-- after an exception and there after a kill.
local held = {}
local function company(worker)
  if not held[worker] then
    local num_reaped, has_lone = unpack(redis.call('HMGET', reaped_key(worker), 'num', 'lone'))
    held[worker] = { num = to_number(num_reaped, 0), has_lone = has_lone }
  end
  return held[worker]
end

-- Counts a crash against a request; returns how often it crashed alone, or false if it ran beside others this time.
local function count_crash(id, owner)
  local reaped, others = reaped_key(owner.worker), company(owner.worker)
  increment(reaped, 'num')
  if owner.alone then redis.call('HSET', reaped, 'lone', 1) end
  redis.call('EXPIRE', reaped, 60)
  if owner.alone or others.num == 1 then return increment(job_key(id), 'crashes_alone') end
  -- Requests that waited while another one was isolated did not cause the crash.
  if not others.has_lone then increment(job_key(id), 'suspect') end
  return false
end

local requeued, dead = {}, {}
local function reap(id, owner)
  if not owner.claim_id then
    -- The owner's record was removed with other tools. If the request ran, it is put back on its queue.
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
    local others = company(owners[id].worker)
    others.num, others.has_lone = others.num + 1, others.has_lone or owners[id].alone
  end
end
for _, id in ipairs(expired) do
  guarded(id, base, nil, reap, id, owners[id])
end
return { requeued, dead, unreadable }
