-- Loaded before look and claim: finds the first request of a line that a worker can run.

local MAX_PASSED = 64

-- The fields of a job, without the request itself, which may be megabytes.
local JOB_FIELDS = { 'status', 'place', 'schema_version', 'version', 'crashes_alone', 'suspect', 'has_ended', 'base',
  'deadline_ms' }
local function read_job(id)
  local values, job = redis.call('HMGET', job_key(id), unpack(JOB_FIELDS)), {}
  for i, field in ipairs(JOB_FIELDS) do job[field] = values[i] end
  check_status(id, job.status)
  job.schema_version = to_number(job.schema_version or 0) or refuse('its schema_version is no number')
  return job
end

-- Fails a job that is no generation request and was put on our queue by somebody else.
local function reject(id, queue)
  unqueue(id, queue, 1)
  redis.call('HSET', job_key(id), 'status', 'failed', 'ended_at', iso(now_us))
  redis.call('ZADD', registry_key('failed', queue), '+inf', id)
end

-- True if a worker can run a job. `reader` has its base, its newest schema, and its weights version by queue.
local function can_run(reader, job, queue)
  local has = reader.weights[queue]
  return job.schema_version <= reader.schema_version
    and (not job.version or job.version == '' or has == '' or job.version == has)
end

-- True if a queued request may be handed out; if it has no `request` field or is overdue, it leaves its queue instead.
local function is_ready(id, reader, queue, job)
  if redis.call('HEXISTS', job_key(id), 'request') == 1 then return not end_overdue(id, reader.base, queue) end
  if job.base then
    set_aside(id, reader.base, queue, 'it has no request')
  else
    reject(id, queue)
  end
  return false
end

-- The place, id and job of the first request of a line that a worker can run, or nil. Requests of newer schemas are
-- passed over, and places without a queued request are dropped.
local function first_of(reader, queue, line)
  local key, num_passed = order_key(queue), 0
  while num_passed < MAX_PASSED do
    local place = redis.call('ZRANGE', key, '[' .. line, '(' .. line .. '}', 'BYLEX', 'LIMIT', num_passed, 1)[1]
    if not place then return nil end
    local id = id_of(place)
    local job = id and guarded(id, reader.base, queue, read_job, id)
    if not job or job.status ~= 'queued' or job.place ~= place then
      redis.call('ZREM', key, place)
      if job and job.status ~= 'queued' then redis.call('LREM', queue_key(queue), 0, id) end
    elseif not can_run(reader, job, queue) then
      num_passed = num_passed + 1
    elseif guarded(id, reader.base, queue, is_ready, id, reader, queue, job) then
      return place, id, job
    end
  end
end
