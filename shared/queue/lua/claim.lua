-- Claims the first request of each line that the worker chose (shared/queue/order.py) from the reply of look.lua; fewer
-- requests if other workers took them meanwhile. A call whose reply was lost may be repeated: the same claim ids return
-- the same requests. In RQ's records, a claim is an execution of the job, and the claim id is the execution's id.
-- ARGV: base, worker, lease (ms), stream ttl (ms), schema version, picks = {queue, line, ...} (msgpack), maximum
--       number of long requests (further ones are passed over, so that the batch is not full of them), then a new
--       claim id for each pick.
-- Returns {claimed, unreadable}. Per claimed request {id, claim id, request, log, alone, queue, version, waited_ms}: log has the
-- events of earlier claims, version is the weights version in the job ('' from an earlier release). alone is 1 for a
-- suspect: its steps must run alone until append.lua clears it.
local base, worker, lease_ms, stream_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local picks = cmsgpack.unpack(ARGV[6])
local NUM_ARGS = 7
local reader = new_reader(base, ARGV[5], ARGV[7])

-- True for a suspect: a request that crashed a worker once while it ran alone, or was in two crashes beside others.
local function must_run_alone(job)
  return to_number(job.crashes_alone, 0) >= 1 or to_number(job.suspect, 0) >= 2
end

-- Resets a job that had ended and was requeued by an operator: it starts again from the beginning, without a client.
local function start_anew(id, job)
  redis.call('DEL', log_key(id), reader_key(id))
  redis.call('HDEL', job_key(id), 'has_ended', 'crashes_alone', 'suspect', 'unreadable', 'deadline_ms')
  redis.call('HSET', job_key(id), 'detached', 1)
  redis.call('PERSIST', job_key(id))
  job.crashes_alone, job.suspect = false, false
end

local function start(id, queue, claim_id, is_watched)
  local composite = id .. ':' .. claim_id
  redis.call('HSET', owner_key(id), 'execution', claim_id, 'worker', worker, 'base', base, 'queue', queue)
  redis.call('HSET', job_key(id), 'status', 'started', 'worker_name', worker,
    'started_at', iso(now_us), 'last_heartbeat', iso(now_us))
  redis.call('HSET', execution_key(composite), 'id', claim_id, 'job_id', id, 'worker_name', worker,
    'created_at', now_us / 1000000, 'last_heartbeat', now_us / 1000000)
  redis.call('PEXPIRE', execution_key(composite), stream_ttl_ms)
  redis.call('ZADD', executions_key(id), math.floor((now_ms + stream_ttl_ms) / 1000), claim_id)
  redis.call('PEXPIRE', executions_key(id), stream_ttl_ms)
  redis.call('SADD', held_key(worker), composite)
  redis.call('PEXPIRE', held_key(worker), stream_ttl_ms)
  -- With the score +inf, RQ's clean-up never requeues the job; reap.lua requeues it when its lease has expired.
  redis.call('ZADD', registry_key('wip', queue), '+inf', composite)
  if is_watched then
    redis.call('HSET', owner_key(id), 'watched_from', redis.call('LLEN', log_key(id)))
  end
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
end

local function describe(id, claim_id, queue, job, request)
  local log = redis.call('LRANGE', log_key(id), 0, -1)
  local waited_ms = now_ms - to_number(redis.call('HGET', job_key(id), 'enqueued_ms'), now_ms)
  local alone = must_run_alone(job) and 1 or 0
  return { id, claim_id, request, log, alone, queue, job.version or '', math.max(0, math.floor(waited_ms)) }
end

-- Returns the requests that an earlier call with the same claim ids claimed, if its reply was lost.
local function claimed_already()
  local position, claimed = {}, {}
  for i = NUM_ARGS + 1, #ARGV do position[ARGV[i]] = i end
  for _, composite in ipairs(redis.call('SMEMBERS', held_key(worker))) do
    local id, claim_id = composite:match('^(.*):(.*)$')
    local described = id and position[claim_id] and guarded(id, base, nil, function()
      local request, queue = redis.call('HGET', job_key(id), 'request'), redis.call('HGET', owner_key(id), 'queue')
      return request and describe(id, claim_id, queue, read_job(id), request)
    end)
    if described then
      redis.call('ZADD', leases_key(base), 'XX', now_ms + lease_ms, id)
      claimed[#claimed + 1] = described
    end
  end
  table.sort(claimed, function(one, other) return position[one[2]] < position[other[2]] end)
  return claimed
end

-- Fails a job that another program put on the queue and that is no generation request.
local function reject(id, queue)
  unqueue(id, queue, 1)
  redis.call('HSET', job_key(id), 'status', 'failed', 'ended_at', iso(now_us))
  redis.call('ZADD', registry_key('failed', queue), '+inf', id)
end

-- Claims a request: moves it from its queue to the worker. Returns nil if the job is no valid waiting request.
local function take(id, queue, place, job, claim_id)
  redis.call('ZREM', order_key(queue), place)
  -- If the list lacks the id, RQ's tools removed it from the list, and only the request's place was left.
  if redis.call('LREM', queue_key(queue), 1, id) == 0 then return nil end
  local request = redis.call('HGET', job_key(id), 'request')
  if not request or request == '' then
    if job.base then set_aside(id, base, queue, 'it has no request') else reject(id, queue) end
    return nil
  end
  if job.has_ended then start_anew(id, job) end
  start(id, queue, claim_id, job.crashes_alone or job.suspect)
  return describe(id, claim_id, queue, job, request)
end

local claimed = claimed_already()
if #claimed > 0 then return { claimed, unreadable } end
if redis.call('EXISTS', RQ .. ':suspended') == 1 then return { {}, unreadable } end

local is_changed = {}
for i = 1, #picks, 2 do
  local queue, line = picks[i], picks[i + 1]
  reader.weights[queue] = reader.weights[queue] or redis.call('HGET', served_key(worker), queue)
  is_changed[queue] = true
  local described, job
  while reader.weights[queue] and not described do
    local place, id
    place, id, job = first_of(reader, queue, line)
    if not id then break end
    described = guarded(id, base, queue, take, id, queue, place, job, ARGV[NUM_ARGS + #claimed + 1])
    if not described then reader.num_removals_left = reader.num_removals_left - 1 end
  end
  claimed[#claimed + 1] = described
  if described and is_long(job) then reader.num_long = reader.num_long - 1 end
  if described and must_run_alone(job) then break end
end
for queue in pairs(is_changed) do update_waiting(base, queue) end
if #claimed > 0 and redis.call('EXISTS', worker_key(worker)) == 1 then
  redis.call('HSET', worker_key(worker), 'state', 'busy')
end
return { claimed, unreadable }
