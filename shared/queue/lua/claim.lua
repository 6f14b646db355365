-- Up to k requests for one worker, fair between the queues of a base: fewest running first, then the one whose
-- head waits longest. Every adapter that runs has a slot on the worker, and no more adapters run than there are slots.
-- One that would push another out of its slot comes after those that don't, until its head has waited for max_wait.
-- If it then finds all slots in use, the queue with the fewest running is closed: it gets nothing more until it has
-- none running and gives its slot. A request for weights that this worker does not have is passed over, and so is one
-- of a newer schema: those behind it go on. A call whose reply was lost may be repeated: the same execution ids bring
-- the same requests.
-- ARGV: base, worker, k, lease (ms), stream ttl (ms), schema version, running per queue (JSON object), slots {num,
--       resident, closed, max_wait_ms} (JSON; queues whose adapters are resident, least recently used first, and those
--       that the last call closed), then k fresh execution ids. The queues that the worker serves, and the version of
--       the weights that it has for each, stand in its `served` hash.
-- Returns {claimed, closed, unreadable}. Per claimed request {id, execution, request, log, alone, queue, version}: log is
-- what was written so far, version is that of the weights by its job ('' from an earlier release), alone says that the request was near crashes and that its steps must run without company, until it
-- is cleared (append.lua).
local base, worker, k = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, stream_ttl_ms, schema_version = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local running, slots = cjson.decode(ARGV[7]), cjson.decode(ARGV[8])
local NUM_ARGS = 8
local MAX_HEADS = 32
local MAX_FIELDS = 1000

-- The base needs no slot, and an adapter that runs has one.
local has_slot = { [base] = true }
local is_resident = { [base] = true }
local num_free, num_empty = slots.num, slots.num
for queue, num in pairs(running) do
  if num > 0 and not has_slot[queue] then
    has_slot[queue], is_resident[queue] = true, true
    num_free, num_empty = num_free - 1, num_empty - 1
  end
end
for _, queue in ipairs(slots.resident) do
  if not is_resident[queue] then
    is_resident[queue] = true
    num_empty = num_empty - 1
  end
end

-- Where there are more residents than slots, those that the worker is about to push out: least recently used first,
-- and none that runs.
local function push_out()
  for _, queue in ipairs(slots.resident) do
    if num_empty >= 0 then return end
    if is_resident[queue] and not has_slot[queue] then
      is_resident[queue] = nil
      num_empty = num_empty + 1
    end
  end
end

push_out()

-- The queues that wait and that this worker serves, oldest head first, since when, and the weights it has for each. Of
-- those whose adapters are not resident, the oldest only: there may be thousands. The others are spare.
local since, weights, spare = {}, {}, {}
local function waiting_queues()
  local entries = redis.call('ZRANGE', waiting_key(base), 0, -1, 'WITHSCORES')
  local names, queues, num_others = {}, {}, 0
  for i = 1, #entries, 2 do names[#names + 1] = entries[i] end
  for first = 1, #names, MAX_FIELDS do
    local last = math.min(first + MAX_FIELDS - 1, #names)
    local served = redis.call('HMGET', served_key(worker), unpack(names, first, last))
    for i = first, last do
      local queue = names[i]
      weights[queue], since[queue] = served[i - first + 1], tonumber(entries[2 * i])
      if weights[queue] and (is_resident[queue] or num_others < MAX_HEADS) then
        if not is_resident[queue] then num_others = num_others + 1 end
        queues[#queues + 1] = queue
      elseif weights[queue] then
        spare[#spare + 1] = queue
      end
    end
  end
  return queues
end

-- The head of a queue has changed.
local function update_since(queue)
  update_waiting(base, queue)
  since[queue] = tonumber(redis.call('ZSCORE', waiting_key(base), queue) or now_ms)
end

local function is_overdue(queue) return now_ms - since[queue] >= slots.max_wait_ms end

-- One queue that runs for each overdue head that finds no slot; those closed already first.
local function close(queues)
  local num_missing = -num_free
  for _, queue in ipairs(queues) do
    if not has_slot[queue] and is_overdue(queue) then num_missing = num_missing + 1 end
  end
  local was_closed, candidates, closed = {}, {}, {}
  for _, queue in ipairs(slots.closed) do was_closed[queue] = true end
  for queue in pairs(has_slot) do
    if queue ~= base then candidates[#candidates + 1] = queue end
  end
  table.sort(candidates, function(one, other)
    if was_closed[one] ~= was_closed[other] then return was_closed[one] == true end
    if running[one] ~= running[other] then return running[one] < running[other] end
    return one < other
  end)
  for i = 1, math.min(num_missing, #candidates) do closed[i] = candidates[i] end
  return closed
end

local is_closed = {}

local function may_run(queue)
  return not is_closed[queue] and (has_slot[queue] or num_free > 0)
end

local function is_preferred(queue) return is_resident[queue] or num_empty > 0 or is_overdue(queue) end

local function comes_before(one, other)
  if is_preferred(one) ~= is_preferred(other) then return is_preferred(one) end
  local num_one, num_other = running[one] or 0, running[other] or 0
  if num_one ~= num_other then return num_one < num_other end
  return since[one] < since[other]
end

local function fairest(queues)
  local best
  for _, queue in ipairs(queues) do
    if may_run(queue) and (not best or comes_before(queue, best)) then best = queue end
  end
  return best
end

local function take_slot(queue)
  if has_slot[queue] then return end
  has_slot[queue] = true
  num_free = num_free - 1
  if not is_resident[queue] then
    is_resident[queue] = true
    num_empty = num_empty - 1
    push_out()
  end
end

-- Near one crash alone or two in company.
local function must_run_alone(job)
  return to_number(job.crashes_alone, 0) >= 1 or to_number(job.suspect, 0) >= 2
end

-- The fields of a job, without the request itself, which may be megabytes.
local JOB_FIELDS = { 'status', 'schema_version', 'version', 'enqueued_ms', 'crashes_alone', 'suspect', 'has_ended',
  'base' }
local function read_job(id)
  local values, job = redis.call('HMGET', job_key(id), unpack(JOB_FIELDS)), {}
  for i, field in ipairs(JOB_FIELDS) do job[field] = values[i] end
  check_status(id, job.status)
  job.schema_version = to_number(job.schema_version or 0) or refuse('its schema_version is no number')
  return job
end

-- A job that had ended and was requeued by an operator begins anew, and without a client.
local function start_anew(id, job)
  redis.call('DEL', log_key(id), reader_key(id))
  redis.call('HDEL', job_key(id), 'has_ended', 'crashes_alone', 'suspect', 'unreadable')
  redis.call('HSET', job_key(id), 'detached', 1)
  redis.call('PERSIST', job_key(id))
  job.crashes_alone, job.suspect = false, false
end

-- A job that is none of ours, put on our queue by somebody else.
local function reject(id, queue)
  redis.call('LREM', queue_key(queue), 1, id)
  redis.call('HSET', job_key(id), 'status', 'failed', 'ended_at', iso(now_us))
  redis.call('ZADD', registry_key('failed', queue), '+inf', id)
end

-- The number of requests at the front of each queue that this call has passed over.
local num_passed = {}

local function can_run(job, queue)
  return job.schema_version <= schema_version
    and (not job.version or job.version == '' or weights[queue] == '' or job.version == weights[queue])
end

-- The first request of a queue that this worker can run, and its job; none if there is none.
local function next_request(queue)
  while true do
    local id = redis.call('LINDEX', queue_key(queue), num_passed[queue] or 0)
    if not id then return nil end
    local job = guarded(id, base, queue, read_job, id)
    if job and job.status ~= 'queued' then
      redis.call('LREM', queue_key(queue), 1, id)
    elseif job and not can_run(job, queue) then
      num_passed[queue] = (num_passed[queue] or 0) + 1
    elseif job and redis.call('HEXISTS', job_key(id), 'request') == 0 then
      if job.base then
        set_aside(id, base, queue, 'it has no request')
      else
        reject(id, queue)
      end
    elseif job then
      return id, job
    end
  end
end

local function start(id, queue, execution, is_watched)
  local composite = id .. ':' .. execution
  redis.call('LREM', queue_key(queue), 1, id)
  redis.call('HSET', owner_key(id), 'execution', execution, 'worker', worker, 'base', base, 'queue', queue)
  redis.call('HSET', job_key(id), 'status', 'started', 'worker_name', worker,
    'started_at', iso(now_us), 'last_heartbeat', iso(now_us))
  redis.call('HSET', execution_key(composite), 'id', execution, 'job_id', id, 'worker_name', worker,
    'created_at', now_us / 1000000, 'last_heartbeat', now_us / 1000000)
  redis.call('PEXPIRE', execution_key(composite), stream_ttl_ms)
  redis.call('ZADD', executions_key(id), math.floor((now_ms + stream_ttl_ms) / 1000), execution)
  redis.call('PEXPIRE', executions_key(id), stream_ttl_ms)
  redis.call('SADD', held_key(worker), composite)
  redis.call('PEXPIRE', held_key(worker), stream_ttl_ms)
  -- Score +inf: RQ's own cleaners leave the entry alone; leases are reaped by reap.lua.
  redis.call('ZADD', registry_key('wip', queue), '+inf', composite)
  if is_watched then
    redis.call('HSET', owner_key(id), 'watched_from', redis.call('LLEN', log_key(id)))
  end
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
end

local function describe(id, execution, job)
  local request, log = redis.call('HGET', job_key(id), 'request'), redis.call('LRANGE', log_key(id), 0, -1)
  local queue = redis.call('HGET', owner_key(id), 'queue')
  return { id, execution, request, log, must_run_alone(job) and 1 or 0, queue, job.version or '' }
end

-- The requests that this very call claimed before its reply was lost, without those that were removed since.
local function claimed_already()
  local place, claimed = {}, {}
  for i = NUM_ARGS + 1, #ARGV do place[ARGV[i]] = i end
  for _, composite in ipairs(redis.call('SMEMBERS', held_key(worker))) do
    local id, execution = composite:match('^(.*):(.*)$')
    local described = id and place[execution] and guarded(id, base, nil, function()
      return describe(id, execution, read_job(id))
    end)
    if described and described[3] then
      redis.call('ZADD', leases_key(base), 'XX', now_ms + lease_ms, id)
      claimed[#claimed + 1] = described
    end
  end
  table.sort(claimed, function(one, other) return place[one[2]] < place[other[2]] end)
  return claimed
end

-- Two keys that nothing here reads: the worker is about to block on the one, `rq info` counts by the other.
doorbell_key(base)
shared_key('set', RQ .. ':queues')

local claimed = claimed_already()
if #claimed > 0 then return { claimed, slots.closed, unreadable } end
if redis.call('EXISTS', RQ .. ':suspended') == 1 then return { {}, {}, unreadable } end

local queues = waiting_queues()
local function skip(queue)
  update_waiting(base, queue)
  for i, other in ipairs(queues) do
    if other == queue then
      queues[i] = table.remove(spare, 1)
      return queues[i] or table.remove(queues, i)
    end
  end
end

-- The queue's first request that this worker can run. If it is not the head, it may have waited for less time: then
-- `since` follows it, nothing is returned, and the queue has to be compared with the others again.
local function look_at(queue)
  local id, job = next_request(queue)
  if not id then
    skip(queue)
    return nil
  end
  local waits_since = to_number(job.enqueued_ms, since[queue])
  if waits_since > since[queue] then
    since[queue] = waits_since
    return nil
  end
  return id, job
end

-- Backwards, since a queue that is left out moves those behind it.
for i = #queues, 1, -1 do
  if not has_slot[queues[i]] and is_overdue(queues[i]) then look_at(queues[i]) end
end
local closed = close(queues)
for _, queue in ipairs(closed) do is_closed[queue] = true end

while #claimed < k and #queues > 0 do
  local queue = fairest(queues)
  if not queue then break end
  local id, job = look_at(queue)
  if id then
    local execution = ARGV[NUM_ARGS + #claimed + 1]
    local described = guarded(id, base, queue, function()
      if job.has_ended then start_anew(id, job) end
      start(id, queue, execution, job.crashes_alone or job.suspect)
      return describe(id, execution, job)
    end)
    if described then
      take_slot(queue)
      running[queue] = (running[queue] or 0) + 1
      claimed[#claimed + 1] = described
    end
    update_since(queue)
    if described and must_run_alone(job) then break end
  end
end
if #claimed > 0 and redis.call('EXISTS', worker_key(worker)) == 1 then
  redis.call('HSET', worker_key(worker), 'state', 'busy')
end
return { claimed, closed, unreadable }
