-- Requests whose owner stopped renewing go back to the front of their queues; one that crashed its worker alone too
-- often is dead-lettered. Needs no lock: the first reaper takes a lease away, the second finds none.
-- ARGV: base, most requests in one call, crashes alone that end a request, ttl (s) of a failed job, event (a format
--       with one %d, its number), exception text as RQ's results have it.
-- Returns {ids requeued, ids dead-lettered}.
local base, max_crashes_alone, failure_ttl, event = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]

-- How many requests a worker held when it was last alive: those it still has, and those reaped from it lately.
local function company(worker)
  return redis.call('SCARD', worker_key(worker) .. ':executions')
    + tonumber(redis.call('GET', OURS .. ':reaped:' .. worker) or 0)
end

local function count_crash(id, worker, num_held)
  redis.call('INCR', OURS .. ':reaped:' .. worker)
  redis.call('EXPIRE', OURS .. ':reaped:' .. worker, 60)
  return redis.call('HINCRBY', job_key(id), num_held == 1 and 'crashes_alone' or 'suspect', 1)
end

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
    local count = count_crash(id, owner.worker, held[owner.worker])
    if held[owner.worker] == 1 and count >= max_crashes_alone then
      finish_ownerless(id, owner, event, { 'failed', '{}', '', ARGV[6], failure_ttl })
      dead[#dead + 1] = id
    else
      requeue(id, owner)
      requeued[#requeued + 1] = id
    end
  end
end
return { requeued, dead }
