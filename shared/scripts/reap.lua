-- Requests whose owner stopped renewing go back to the front of their queues; one that crashed its worker alone too
-- often is dead-lettered. Needs no lock: the first reaper takes a lease away, the second finds none.
-- ARGV: base, most requests in one call, crashes alone that end a request, ttl (s) of a failed job, event (a format
--       with one %d, its number), exception text as RQ's results have it, the worker that reaps.
-- Returns {ids requeued, ids dead-lettered}.
local base, max_crashes_alone, failure_ttl, event = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

-- What a lost worker held when it was last alive, those reaped from it lately included: how many requests, and
-- whether its steps ran one of them alone.
local function company(worker)
  local num_held, has_lone = unpack(redis.call('HMGET', reaped_key(worker), 'num', 'lone'))
  local composites = redis.call('SMEMBERS', worker_key(worker) .. ':executions')
  for _, composite in ipairs(composites) do
    has_lone = has_lone or get_owner(composite:match('^(.*):')).alone
  end
  return { num_held = tonumber(num_held or 0) + #composites, has_lone = has_lone }
end

-- Counts a crash against a request; returns how often it was alone, or false if it had company this time.
local function count_crash(id, owner, held)
  redis.call('HINCRBY', reaped_key(owner.worker), 'num', 1)
  if owner.alone then redis.call('HSET', reaped_key(owner.worker), 'lone', 1) end
  redis.call('EXPIRE', reaped_key(owner.worker), 60)
  if owner.alone or held.num_held == 1 then return redis.call('HINCRBY', job_key(id), 'crashes_alone', 1) end
  -- Those that waited while another ran alone had no part in it.
  if not held.has_lone then redis.call('HINCRBY', job_key(id), 'suspect', 1) end
  return false
end

if not may_judge(base, ARGV[7]) then return { {}, {} } end
local requeued, dead, held = {}, {}, {}
local expired = redis.call('ZRANGEBYSCORE', leases_key(base), '-inf', now_ms, 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(expired) do
  local worker = get_owner(id).worker
  if worker then held[worker] = held[worker] or company(worker) end
end
for _, id in ipairs(expired) do
  local owner = get_owner(id)
  if not owner.execution then
    redis.call('ZREM', leases_key(base), id)
  elseif redis.call('EXISTS', job_key(id)) == 0 or owner.aborted then
    requeue(id, owner)
  else
    local num_alone = count_crash(id, owner, held[owner.worker])
    if num_alone and num_alone >= max_crashes_alone then
      finish_ownerless(id, owner, event, { 'failed', '{}', '', ARGV[6], failure_ttl })
      dead[#dead + 1] = id
    else
      requeue(id, owner)
      requeued[#requeued + 1] = id
    end
  end
end
return { requeued, dead }
