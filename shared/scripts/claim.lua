-- Up to k requests for one worker, fair between the queues of a base: fewest running first, then the one whose
-- head waits longest.
-- ARGV: base, worker, k, lease (ms), stream ttl (ms), schema version, running per queue (JSON object), queues to
--       serve (JSON array), then k fresh execution ids.
-- Returns {id, execution, request, log, alone} per claimed request: log is what was written so far, alone says that
-- the request was near crashes and that its steps must run without company, until it is cleared (append.lua).
local base, worker, k = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, stream_ttl_ms, schema_version = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local running, served = cjson.decode(ARGV[7]), cjson.decode(ARGV[8])
local MAX_HEADS = 32

if redis.call('EXISTS', RQ .. ':suspended') == 1 then
  return {}
end

-- The queues that wait and that this worker serves, oldest head first.
local function waiting_queues()
  local is_served, queues = {}, {}
  for _, queue in ipairs(served) do is_served[queue] = true end
  for _, queue in ipairs(redis.call('ZRANGE', waiting_key(base), 0, -1)) do
    if is_served[queue] then queues[#queues + 1] = queue end
    if #queues == MAX_HEADS then break end
  end
  return queues
end

local function fairest(queues)
  local best
  for _, queue in ipairs(queues) do
    if not best or (running[queue] or 0) < (running[best] or 0) then best = queue end
  end
  return best
end

-- Near one crash alone or two in company.
local function must_run_alone(job)
  return tonumber(job[3] or 0) >= 1 or tonumber(job[4] or 0) >= 2
end

-- A job that had ended and was requeued by an operator begins anew, and without a client.
local function start_anew(id)
  redis.call('DEL', log_key(id), reader_key(id))
  redis.call('HDEL', job_key(id), 'has_ended', 'crashes_alone', 'suspect')
  redis.call('HSET', job_key(id), 'detached', 1)
  redis.call('PERSIST', job_key(id))
end

-- A job that is none of ours, put on our queue by somebody else.
local function reject(id, queue)
  redis.call('LPOP', queue_key(queue))
  redis.call('HSET', job_key(id), 'status', 'failed', 'ended_at', iso(now_us))
  redis.call('ZADD', RQ .. ':failed:' .. queue, '+inf', id)
end

local function start(id, queue, execution, is_watched, alone)
  local composite = id .. ':' .. execution
  redis.call('LPOP', queue_key(queue))
  redis.call('HSET', job_key(id), 'status', 'started', 'worker_name', worker,
    'started_at', iso(now_us), 'last_heartbeat', iso(now_us))
  redis.call('HSET', RQ .. ':execution:' .. composite, 'id', execution, 'job_id', id, 'worker_name', worker,
    'created_at', now_us / 1000000, 'last_heartbeat', now_us / 1000000)
  redis.call('PEXPIRE', RQ .. ':execution:' .. composite, stream_ttl_ms)
  redis.call('ZADD', RQ .. ':executions:' .. id, math.floor((now_ms + stream_ttl_ms) / 1000), execution)
  redis.call('PEXPIRE', RQ .. ':executions:' .. id, stream_ttl_ms)
  redis.call('SADD', worker_key(worker) .. ':executions', composite)
  redis.call('PEXPIRE', worker_key(worker) .. ':executions', stream_ttl_ms)
  -- Score +inf: RQ's own cleaners leave the entry alone; leases are reaped by reap.lua.
  redis.call('ZADD', RQ .. ':wip:' .. queue, '+inf', composite)
  redis.call('HSET', owner_key(id), 'execution', execution, 'worker', worker, 'base', base, 'queue', queue)
  if alone then redis.call('HSET', owner_key(id), 'alone', 1) end
  if is_watched then
    redis.call('HSET', owner_key(id), 'watched_from', redis.call('LLEN', log_key(id)))
  end
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
end

local claimed = {}
local queues = waiting_queues()
local function skip(queue)
  for i, other in ipairs(queues) do
    if other == queue then return table.remove(queues, i) end
  end
end

while #claimed < k and #queues > 0 do
  local queue = fairest(queues)
  update_waiting(base, queue)
  local id = redis.call('LINDEX', queue_key(queue), 0)
  local job = id and redis.call('HMGET', job_key(id), 'request', 'schema_version', 'crashes_alone', 'suspect',
    'has_ended')
  if id and not job[1] then
    reject(id, queue)
  elseif not id or tonumber(job[2] or 0) > schema_version then
    skip(queue)
  else
    if job[5] then
      start_anew(id)
      job[3], job[4] = false, false
    end
    local alone = must_run_alone(job)
    local execution = ARGV[8 + #claimed + 1]
    start(id, queue, execution, job[3] or job[4], alone)
    running[queue] = (running[queue] or 0) + 1
    update_waiting(base, queue)
    claimed[#claimed + 1] = { id, execution, job[1], redis.call('LRANGE', log_key(id), 0, -1), alone and 1 or 0 }
    if alone then break end
  end
end
if #claimed > 0 and redis.call('EXISTS', worker_key(worker)) == 1 then
  redis.call('HSET', worker_key(worker), 'state', 'busy')
end
return claimed
