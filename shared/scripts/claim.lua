-- Up to k requests for one worker, fair between the queues of a base: fewest running first, then the one whose
-- head waits longest. Every adapter that runs has a slot on the worker, and no more adapters run than there are slots.
-- One that would push another out of its slot comes after those that don't, until its head has waited for max_wait.
-- If it then finds all slots in use, the queue with the fewest running is closed: it gets nothing more until it has
-- none running and gives its slot. A call whose reply was lost may be repeated: the same execution ids bring the same
-- requests.
-- ARGV: base, worker, k, lease (ms), stream ttl (ms), schema version, running per queue (JSON object), queues to
--       serve (JSON array), slots {num, resident, closed, max_wait_ms} (JSON; queues whose adapters are resident, least
--       recently used first, and those that the last call closed), then k fresh execution ids.
-- Returns {claimed, closed}. Per claimed request {id, execution, request, log, alone}: log is what was written so far,
-- alone says that the request was near crashes and that its steps must run without company, until it is cleared
-- (append.lua).
local base, worker, k = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, stream_ttl_ms, schema_version = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local running, slots = cjson.decode(ARGV[7]), cjson.decode(ARGV[9])
local MAX_HEADS = 32
local JOB_FIELDS = { 'request', 'schema_version', 'crashes_alone', 'suspect', 'has_ended' }

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

-- The queues that wait and that this worker serves, oldest head first, and since when. Of those whose adapters are
-- not resident, the oldest only: there may be thousands.
local since = {}
local function waiting_queues()
  local is_served, queues, num_others = {}, {}, 0
  local entries = redis.call('ZRANGE', waiting_key(base), 0, -1, 'WITHSCORES')
  if #entries == 0 then return {} end
  for _, queue in ipairs(cjson.decode(ARGV[8])) do is_served[queue] = true end
  for i = 1, #entries, 2 do
    local queue = entries[i]
    if is_served[queue] and (is_resident[queue] or num_others < MAX_HEADS) then
      if not is_resident[queue] then num_others = num_others + 1 end
      queues[#queues + 1] = queue
      since[queue] = tonumber(entries[i + 1])
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

local function start(id, queue, execution, is_watched)
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
  if is_watched then
    redis.call('HSET', owner_key(id), 'watched_from', redis.call('LLEN', log_key(id)))
  end
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
end

local function describe(id, execution, job)
  return { id, execution, job[1], redis.call('LRANGE', log_key(id), 0, -1), must_run_alone(job) and 1 or 0 }
end

-- What this very call claimed before its reply was lost, but for what was removed since.
local function claimed_already()
  local place, claimed = {}, {}
  for i = 10, #ARGV do place[ARGV[i]] = i end
  for _, composite in ipairs(redis.call('SMEMBERS', worker_key(worker) .. ':executions')) do
    local id, execution = composite:match('^(.*):(.*)$')
    local job = place[execution] and redis.call('HMGET', job_key(id), unpack(JOB_FIELDS))
    if job and job[1] then
      redis.call('ZADD', leases_key(base), 'XX', now_ms + lease_ms, id)
      claimed[#claimed + 1] = describe(id, execution, job)
    end
  end
  table.sort(claimed, function(one, other) return place[one[2]] < place[other[2]] end)
  return claimed
end

local claimed = claimed_already()
if #claimed > 0 then return { claimed, slots.closed } end
if redis.call('EXISTS', RQ .. ':suspended') == 1 then return { {}, {} } end

local queues = waiting_queues()
local closed = close(queues)
for _, queue in ipairs(closed) do is_closed[queue] = true end
local function skip(queue)
  for i, other in ipairs(queues) do
    if other == queue then return table.remove(queues, i) end
  end
end

while #claimed < k and #queues > 0 do
  local queue = fairest(queues)
  if not queue then break end
  update_waiting(base, queue)
  local id = redis.call('LINDEX', queue_key(queue), 0)
  local job = id and redis.call('HMGET', job_key(id), unpack(JOB_FIELDS))
  if id and not job[1] then
    reject(id, queue)
    update_since(queue)
  elseif not id or tonumber(job[2] or 0) > schema_version then
    skip(queue)
  else
    if job[5] then
      start_anew(id)
      job[3], job[4] = false, false
    end
    local execution = ARGV[9 + #claimed + 1]
    start(id, queue, execution, job[3] or job[4])
    take_slot(queue)
    running[queue] = (running[queue] or 0) + 1
    update_since(queue)
    claimed[#claimed + 1] = describe(id, execution, job)
    if must_run_alone(job) then break end
  end
end
if #claimed > 0 and redis.call('EXISTS', worker_key(worker)) == 1 then
  redis.call('HSET', worker_key(worker), 'state', 'busy')
end
return { claimed, closed }
