-- Up to k requests for one worker, fair between the queues of a base: fewest running first, then the one whose
-- head waits longest.
-- ARGV: base, worker, k, lease (ms), stream ttl (ms), schema version, running per queue (JSON object), queues to
--       serve (JSON array; empty = all of the base), then k fresh execution ids.
-- Returns {id, execution, request, log} per claimed request, log being the events written so far.
local base, worker, k = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, stream_ttl_ms, schema_version = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local running, served = cjson.decode(ARGV[7]), cjson.decode(ARGV[8])
local MAX_HEADS = 32

if redis.call('EXISTS', RQ .. ':suspended') == 1 then
  return {}
end

-- The queues that wait, oldest head first.
local function waiting_queues()
  if #served == 0 then
    return redis.call('ZRANGE', waiting_key(base), 0, MAX_HEADS - 1)
  end
  local scored = {}
  for _, queue in ipairs(served) do
    local score = redis.call('ZSCORE', waiting_key(base), queue)
    if score then table.insert(scored, { queue, tonumber(score) }) end
  end
  table.sort(scored, function(a, b) return a[2] < b[2] end)
  local queues = {}
  for i, entry in ipairs(scored) do queues[i] = entry[1] end
  return queues
end

local function fairest(queues)
  local best
  for _, queue in ipairs(queues) do
    if not best or (running[queue] or 0) < (running[best] or 0) then best = queue end
  end
  return best
end

local function start(id, queue, execution)
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
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
end

local claimed = {}
local queues = waiting_queues()
while #claimed < k and #queues > 0 do
  local queue = fairest(queues)
  update_waiting(base, queue)
  local id = redis.call('LINDEX', queue_key(queue), 0)
  local job = id and redis.call('HMGET', job_key(id), 'request', 'schema_version')
  if not id or tonumber(job[2] or 0) > schema_version then
    for i, other in ipairs(queues) do
      if other == queue then table.remove(queues, i) break end
    end
  else
    local execution = ARGV[8 + #claimed + 1]
    start(id, queue, execution)
    running[queue] = (running[queue] or 0) + 1
    update_waiting(base, queue)
    claimed[#claimed + 1] = { id, execution, job[1] or '', redis.call('LRANGE', log_key(id), 0, -1) }
  end
end
if #claimed > 0 and redis.call('EXISTS', worker_key(worker)) == 1 then
  redis.call('HSET', worker_key(worker), 'state', 'busy')
end
return claimed
