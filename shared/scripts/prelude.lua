-- Stands before every script of this folder. Names of keys: shared/keys.py; @RQ@ is RQ's prefix.
-- Only commands of Redis 6.2; the clock is the server's.

local RQ, OURS = '@RQ@', 'lorelay'

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now_ms = math.floor(now_us / 1000)

-- RQ's timestamp format; days to a date after Howard Hinnant's civil_from_days.
local function iso(us)
  local seconds = math.floor(us / 1000000)
  local days = math.floor(seconds / 86400)
  local rest = seconds - days * 86400
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day,
    math.floor(rest / 3600), math.floor(rest / 60) % 60, rest % 60, us - seconds * 1000000)
end

local function job_key(id) return RQ .. ':job:' .. id end
local function queue_key(queue) return RQ .. ':queue:' .. queue end
local function worker_key(worker) return RQ .. ':worker:' .. worker end
local function owner_key(id) return OURS .. ':owner:' .. id end
local function log_key(id) return OURS .. ':log:' .. id end
local function reader_key(id) return OURS .. ':reader:' .. id end
local function waiting_key(base) return OURS .. ':waiting:' .. base end
local function leases_key(base) return OURS .. ':leases:' .. base end

local function workers_key(base) return OURS .. ':workers:' .. base end
local function reaped_key(worker) return OURS .. ':reaped:' .. worker end

-- Whether a worker's own lease still holds. After a pause of the server, or of the worker, it does not: then the leases
-- of others may look expired too, before they had the time to renew them, and the worker must judge nobody.
local function may_judge(base, worker)
  return tonumber(redis.call('ZSCORE', workers_key(base), worker) or 0) > now_ms
end

local function ring(base)
  local doorbell = OURS .. ':doorbell:' .. base
  redis.call('LPUSH', doorbell, 1)
  redis.call('LTRIM', doorbell, 0, 63)
end

-- `waiting` follows the head of a queue; heads that are no queued job any more are dropped on the way.
local function update_waiting(base, queue)
  while true do
    local head = redis.call('LINDEX', queue_key(queue), 0)
    if not head then
      return redis.call('ZREM', waiting_key(base), queue)
    end
    local job = redis.call('HMGET', job_key(head), 'status', 'enqueued_ms')
    if job[1] == 'queued' then
      return redis.call('ZADD', waiting_key(base), tonumber(job[2]) or now_ms, queue)
    end
    redis.call('LPOP', queue_key(queue))
  end
end

-- Ownership of a request and RQ's records of its execution, gone.
local function drop_execution(id, owner)
  local composite = id .. ':' .. owner.execution
  redis.call('ZREM', RQ .. ':wip:' .. owner.queue, composite)
  redis.call('ZREM', RQ .. ':executions:' .. id, owner.execution)
  redis.call('DEL', RQ .. ':execution:' .. composite)
  local executions = worker_key(owner.worker) .. ':executions'
  redis.call('SREM', executions, composite)
  if redis.call('SCARD', executions) == 0 and redis.call('HGET', worker_key(owner.worker), 'state') == 'busy' then
    redis.call('HSET', worker_key(owner.worker), 'state', 'idle')
  end
  redis.call('ZREM', leases_key(owner.base), id)
  redis.call('DEL', owner_key(id))
end

local function get_owner(id)
  local owner = redis.call('HMGET', owner_key(id), 'execution', 'worker', 'base', 'queue', 'aborted', 'watched_from',
    'alone')
  return { execution = owner[1], worker = owner[2], base = owner[3], queue = owner[4], aborted = owner[5],
    watched_from = tonumber(owner[6]), alone = owner[7] }
end

-- An event into its log, once; returns the channel of the API to tell, or false.
local function write_event(id, event_no, event)
  if event_no ~= redis.call('LLEN', log_key(id)) then return false end
  redis.call('RPUSH', log_key(id), event)
  return redis.call('GET', reader_key(id))
end

local function write_result(id, owner, started, status, return_value, exc_text, ttl)
  local RESULT_TYPE = { finished = 1, failed = 2, stopped = 3 }
  if not RESULT_TYPE[status] then return end
  local fields = { 'type', RESULT_TYPE[status], 'worker_name', owner.worker, 'execution_id', owner.execution,
    'execution_started_at', started, 'execution_ended_at', now_us / 1000000 }
  for name, value in pairs({ return_value = return_value, exc_string = exc_text }) do
    if value ~= '' then
      table.insert(fields, name)
      table.insert(fields, value)
    end
  end
  redis.call('XADD', RQ .. ':results:' .. id, 'MAXLEN', 10, '*', unpack(fields))
  redis.call('EXPIRE', RQ .. ':results:' .. id, ttl)
end

local function count_job(owner, status, working_s)
  if redis.call('EXISTS', worker_key(owner.worker)) == 1 then
    local counter = status == 'finished' and 'successful_job_count' or 'failed_job_count'
    redis.call('HINCRBY', worker_key(owner.worker), counter, 1)
    redis.call('HINCRBYFLOAT', worker_key(owner.worker), 'total_working_time', working_s)
  end
  local drained = OURS .. ':drained:' .. owner.base .. ':' .. math.floor(now_ms / 10000)
  redis.call('INCR', drained)
  redis.call('EXPIRE', drained, 60)
end

-- The job of a request is over. outcome = {status, meta, return value, exception text, ttl (s)}, as append has it.
local function finish(id, owner, outcome)
  local status, meta, return_value, exc_text, ttl = unpack(outcome)
  local REGISTRY = { stopped = 'failed' }
  local created = redis.call('HGET', RQ .. ':execution:' .. id .. ':' .. owner.execution, 'created_at')
  local started = tonumber(created or now_us / 1000000)
  redis.call('HSET', job_key(id), 'status', status, 'ended_at', iso(now_us), 'meta', meta, 'has_ended', 1)
  redis.call('ZADD', RQ .. ':' .. (REGISTRY[status] or status) .. ':' .. owner.queue,
    math.floor(now_ms / 1000) + ttl, id)
  write_result(id, owner, started, status, return_value, exc_text, ttl)
  drop_execution(id, owner)
  count_job(owner, status, now_us / 1000000 - started)
  for _, key in ipairs({ job_key(id), log_key(id), reader_key(id) }) do
    redis.call('EXPIRE', key, ttl)
  end
end

-- The terminal event of a request that ends without its owner; `outcome` as in finish.
local function finish_ownerless(id, owner, format, outcome)
  local event_no = redis.call('LLEN', log_key(id))
  local event = format:format(event_no)
  local reader = write_event(id, event_no, event)
  finish(id, owner, outcome)
  if reader then redis.call('PUBLISH', reader, id .. ' ' .. event) end
end

local ABORTED = '{"event_no":%d,"finish_reason":"abort","usage":{"prompt_tokens":0,"completion_tokens":0}}'

-- A running request back to the front of its queue, its log kept: whoever claims it goes on from there. One that was
-- given up ends instead.
local function requeue(id, owner)
  if redis.call('EXISTS', job_key(id)) == 0 then return drop_execution(id, owner) end
  if owner.aborted then
    return finish_ownerless(id, owner, ABORTED, { 'canceled', '{}', '', '', 60 })
  end
  drop_execution(id, owner)
  redis.call('HSET', job_key(id), 'status', 'queued', 'worker_name', '', 'started_at', '')
  redis.call('LPUSH', queue_key(owner.queue), id)
  update_waiting(owner.base, owner.queue)
  ring(owner.base)
end
