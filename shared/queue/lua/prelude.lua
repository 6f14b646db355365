-- Loaded before every script of this folder: key names, ownership, the end of jobs, unreadable records.
-- shared/queue/keys.py explains the keys; @RQ@ is RQ's prefix. Scripts use only commands of Redis 6.2, and its clock.

local RQ, OURS = '@RQ@', 'lorelay'

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now_ms = math.floor(now_us / 1000)

-- Formats a time as RQ does. The date is computed by Howard Hinnant's algorithm civil_from_days.
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

-- Unreadable records, part 1. Other programs may write to Redis, so a number may be malformed, and a key may have a
-- wrong type. Such a record may end one request, but never a worker, which ends if a script raises an error.

-- {request id or key, reason} of each unreadable record that this call met; the caller logs them.
local unreadable = {}

-- Returns the number in a field, or `default` if the field is missing or no number.
local function to_number(text, default)
  local number = tonumber(text or '')
  -- NaN is not equal to itself.
  if number and number == number and math.abs(number) < 1e15 then return number end
  return default
end

local function increment(key, field, by)
  local number = to_number(redis.call('HGET', key, field), 0) + (by or 1)
  redis.call('HSET', key, field, number)
  return number
end

-- Returns a key that many requests share. If it has a wrong type, it is renamed and kept for a day; scripts and
-- heartbeats then create it anew.
local checked = {}
local function shared_key(kind, key)
  if not checked[key] then
    checked[key] = true
    local found = redis.call('TYPE', key).ok
    if found ~= kind and found ~= 'none' then
      local aside = OURS .. ':unreadable:' .. key
      redis.call('RENAME', key, aside)
      redis.call('EXPIRE', aside, 86400)
      unreadable[#unreadable + 1] = { key, 'a ' .. found .. ' in place of a ' .. kind .. ', renamed to ' .. aside }
    end
  end
  return key
end

-- Keys of one request.
local function job_key(id) return RQ .. ':job:' .. id end
local function executions_key(id) return RQ .. ':executions:' .. id end
local function results_key(id) return RQ .. ':results:' .. id end
local function execution_key(composite) return RQ .. ':execution:' .. composite end
local function owner_key(id) return OURS .. ':owner:' .. id end
local function log_key(id) return OURS .. ':log:' .. id end
local function reader_key(id) return OURS .. ':reader:' .. id end

-- Keys that many requests share.
local function queue_key(queue) return shared_key('list', RQ .. ':queue:' .. queue) end
local function registry_key(name, queue) return shared_key('zset', RQ .. ':' .. name .. ':' .. queue) end
local function worker_key(worker) return shared_key('hash', RQ .. ':worker:' .. worker) end
local function held_key(worker) return shared_key('set', RQ .. ':worker:' .. worker .. ':executions') end
local function waiting_key(base) return shared_key('zset', OURS .. ':waiting:' .. base) end
local function leases_key(base) return shared_key('zset', OURS .. ':leases:' .. base) end
local function workers_key(base) return shared_key('zset', OURS .. ':workers:' .. base) end
local function doorbell_key(base) return shared_key('list', OURS .. ':doorbell:' .. base) end
local function reaped_key(worker) return shared_key('hash', OURS .. ':reaped:' .. worker) end
local function order_key(queue) return shared_key('zset', OURS .. ':order:' .. queue) end
local function served_key(worker) return shared_key('hash', OURS .. ':served:' .. worker) end

-- True if a worker's own lease has not expired. After a pause of Redis, all leases have expired, because no worker
-- could renew its lease. If a worker reaped then, it would take requests from healthy workers.
local function holds_lease(base, worker)
  return tonumber(redis.call('ZSCORE', workers_key(base), worker) or 0) > now_ms
end

local function ring(base)
  redis.call('LPUSH', doorbell_key(base), 1)
  redis.call('LTRIM', doorbell_key(base), 0, 63)
end

-- Removes RQ's records of all claims of a request whose owner record, and with it the claim id, was lost.
local function drop_claims(id, queue)
  for _, claim_id in ipairs(redis.call('ZRANGE', executions_key(id), 0, -1)) do
    local composite = id .. ':' .. claim_id
    local worker = redis.pcall('HGET', execution_key(composite), 'worker_name')
    if type(worker) == 'string' then redis.call('SREM', held_key(worker), composite) end
    redis.call('ZREM', registry_key('wip', queue), composite)
    redis.call('DEL', execution_key(composite))
  end
  redis.call('DEL', executions_key(id))
end

-- Deletes the owner and the lease of a request, and RQ's record of the execution.
local function drop_ownership(id, owner)
  if owner.claim_id == '' then drop_claims(id, owner.queue) end
  local composite = id .. ':' .. owner.claim_id
  redis.call('ZREM', registry_key('wip', owner.queue), composite)
  redis.call('ZREM', executions_key(id), owner.claim_id)
  redis.call('DEL', execution_key(composite))
  redis.call('SREM', held_key(owner.worker), composite)
  if redis.call('SCARD', held_key(owner.worker)) == 0
    and redis.call('HGET', worker_key(owner.worker), 'state') == 'busy' then
    redis.call('HSET', worker_key(owner.worker), 'state', 'idle')
  end
  redis.call('ZREM', leases_key(owner.base), id)
  redis.call('DEL', owner_key(id))
end

local function get_owner(id)
  local owner = redis.call('HMGET', owner_key(id), 'execution', 'worker', 'base', 'queue', 'aborted', 'watched_from',
    'alone')
  return { claim_id = owner[1], worker = owner[2], base = owner[3], queue = owner[4], aborted = owner[5],
    watched_from = to_number(owner[6]), alone = owner[7] }
end

-- Returns a placeholder owner for a request that waits and has none.
local function nobody(base, queue) return { claim_id = '', worker = '', base = base, queue = queue } end

-- Raises an error, which `guarded` catches, about a record that has the right type but an impossible value.
local function refuse(reason) error('unreadable: ' .. reason, 0) end

-- Appends an event to its log, unless the log has the event already; returns the channel of the API that reads the
-- request's events, or false.
local function write_event(id, event_no, event)
  local length = redis.call('RPUSH', log_key(id), event) - 1
  if event_no == length then return redis.call('GET', reader_key(id)) end
  -- An unexpected length is rare: appending first and checking afterwards saves a command for each token.
  redis.call('LTRIM', log_key(id), 0, -2)
  if event_no > length then refuse('its log has lost events') end
  if redis.call('LINDEX', log_key(id), event_no) ~= event then refuse('its log has an event of somebody else') end
  return false
end

-- Writes and publishes the last event of a request that its worker does not end; `format` has a %d for the event_no.
local function tell_end(id, format)
  local event_no = redis.call('LLEN', log_key(id))
  local event = format:format(event_no)
  local reader = write_event(id, event_no, event)
  if reader then redis.call('PUBLISH', reader, id .. ' ' .. event) end
end

local function write_result(id, owner, started, status, return_value, exc_text, ttl)
  local RESULT_TYPE = { finished = 1, failed = 2, stopped = 3 }
  if not RESULT_TYPE[status] then return end
  local fields = { 'type', RESULT_TYPE[status], 'worker_name', owner.worker, 'execution_id', owner.claim_id,
    'execution_started_at', started, 'execution_ended_at', now_us / 1000000 }
  for name, value in pairs({ return_value = return_value, exc_string = exc_text }) do
    if value ~= '' then
      table.insert(fields, name)
      table.insert(fields, value)
    end
  end
  redis.call('XADD', results_key(id), 'MAXLEN', 10, '*', unpack(fields))
  redis.call('EXPIRE', results_key(id), ttl)
end

local function count_job(owner, status, working_s)
  if status ~= 'refused' and redis.call('EXISTS', worker_key(owner.worker)) == 1 then
    local counter = status == 'finished' and 'successful_job_count' or 'failed_job_count'
    increment(worker_key(owner.worker), counter)
    increment(worker_key(owner.worker), 'total_working_time', working_s)
  end
  local drained = shared_key('string', OURS .. ':drained:' .. owner.base .. ':' .. math.floor(now_ms / 10000))
  redis.call('SET', drained, to_number(redis.call('GET', drained), 0) + 1, 'EX', 60)
end

-- Life (s) of what is left of a refused request whose client waits for the answer, or has left.
local REFUSED_TTL_S = 60

-- Empties the prompt of a request that never runs again. It may be megabytes, which would stay until the job expires: a
-- client could fill Redis with requests that no worker takes in time.
-- HDEL is avoided so that an API can abort requests even while its Redis user has only the rules of the release before,
-- which lack +hdel. Its log and `/ready` ask for the missing rules then (shared/queue/permissions.py).
local function drop_prompt(id) redis.call('HSET', job_key(id), 'request', '') end

-- Writes RQ's records of the end of a job. A refused request, which its client has to correct or to send again, is no failure: it gets
-- no entry in a registry and no result, and only a detached one stays, so that its client can read the reason.
-- Returns the time (s) for which the job is kept.
local function record_end(id, owner, outcome, started)
  local status, meta, return_value, exc_text, ttl = unpack(outcome)
  local REGISTRY = { stopped = 'failed' }
  redis.call('HSET', job_key(id), 'status', status == 'refused' and 'finished' or status, 'ended_at', iso(now_us),
    'meta', meta, 'has_ended', 1)
  if status == 'refused' or status == 'canceled' then drop_prompt(id) end
  if status == 'refused' then
    return redis.call('HGET', job_key(id), 'detached') == '1' and ttl or math.min(ttl, REFUSED_TTL_S)
  end
  redis.call('ZADD', registry_key(REGISTRY[status] or status, owner.queue), math.floor(now_ms / 1000) + ttl, id)
  write_result(id, owner, started, status, return_value, exc_text, ttl)
  return ttl
end

-- Ends the job of a request. outcome = {status, meta, return value, exception text, ttl (s)}; see append.lua. Metrics
-- counted here would miss requests that are aborted while they wait (abort.lua) and jobs that an operator deletes, and
-- would count a requeued job again.
local function finish(id, owner, outcome)
  local created = redis.call('HGET', execution_key(id .. ':' .. owner.claim_id), 'created_at')
  local started = to_number(created, now_us / 1000000)
  local ttl = record_end(id, owner, outcome, started)
  drop_ownership(id, owner)
  count_job(owner, outcome[1], now_us / 1000000 - started)
  for _, key in ipairs({ job_key(id), log_key(id), reader_key(id) }) do
    redis.call('EXPIRE', key, ttl)
  end
end

-- Ends a request that no worker runs: writes the last event for its client, then ends the job.
local function finish_ownerless(id, owner, format, outcome)
  tell_end(id, format)
  finish(id, owner, outcome)
end

-- Time (s) for which a request that a script ends as failed is kept. `failure_ttl` is RQ's, which is longer (job_record.py);
-- jobs of an earlier release have only that.
local function keep_failed_s(id)
  local own, rqs = unpack(redis.call('HMGET', job_key(id), 'keep_failed_s', 'failure_ttl'))
  return math.floor(to_number(own or rqs, 86400))
end

-- Unreadable records, part 2: records of a single request.

local UNREADABLE = '{"event_no":%d,"finish_reason":"error","error":{"code":"generation_failed",'
  .. '"message":"A record of the request in Redis can\'t be read."}}'
local UNREADABLE_RESULT = '@UNREADABLE_RESULT@'

-- Removes a request from the list of its queue (`count` as in LREM), and its place (sort key) from the queue's index.
local function unqueue(id, queue, count)
  local place = redis.pcall('HGET', job_key(id), 'place')
  if type(place) == 'string' then redis.call('ZREM', order_key(queue), place) end
  redis.call('LREM', queue_key(queue), count, id)
end

-- Ends one request, whatever is wrong with its records. The client gets an error, and the job fails with the reason. If
-- there is no job hash, only the other keys are removed. `queue`: the queue in which it waits, or nil if not known.
local function set_aside(id, base, queue, reason)
  unreadable[#unreadable + 1] = { id, reason }
  local function keep_if(kind, key)
    local found = redis.call('TYPE', key).ok
    if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
  end
  keep_if('hash', job_key(id))
  keep_if('hash', owner_key(id))
  keep_if('list', log_key(id))
  keep_if('string', reader_key(id))
  keep_if('zset', executions_key(id))
  keep_if('stream', results_key(id))
  local owner = get_owner(id)
  local origin = redis.call('HGET', job_key(id), 'origin')
  for field, value in pairs(nobody(base, queue or origin or '')) do owner[field] = owner[field] or value end
  keep_if('hash', execution_key(id .. ':' .. owner.claim_id))
  unqueue(id, queue or owner.queue, 0)
  if redis.call('EXISTS', job_key(id)) == 1 then
    redis.call('HSET', job_key(id), 'unreadable', reason)
    local meta = cjson.encode({ error = 'generation_failed', unreadable = reason })
    finish_ownerless(id, owner, UNREADABLE, { 'failed', meta, '', UNREADABLE_RESULT, keep_failed_s(id) })
  else
    tell_end(id, UNREADABLE)
    drop_ownership(id, owner)
    for _, key in ipairs({ log_key(id), reader_key(id) }) do redis.call('EXPIRE', key, 60) end
  end
end

-- Parts of messages of errors that are caused by a record. Any other error (out of memory, a read-only replica) is due
-- to the server's state, and is raised to the caller.
local SIGNS = { 'WRONGTYPE', 'unreadable: ', 'not an integer', 'not a valid float', 'attempt to ', 'bad argument',
  'must be strings or integers' }

-- Calls `work(...)` for one request and returns its result. If a record of the request can't be read, the request ends
-- by `set_aside`, and nothing is returned.
local function guarded(id, base, queue, work, ...)
  local ok, result = pcall(work, ...)
  if ok then return result end
  local message = type(result) == 'table' and result.err or tostring(result)
  for _, sign in ipairs(SIGNS) do
    if message:find(sign, 1, true) then return set_aside(id, base, queue, message) end
  end
  error(result, 0)
end

-- Raises an error for a job in a queue with an impossible status. The id may rightly be in the list if the job has
-- ended, was canceled, was claimed already, or has been deleted.
local function check_status(id, status)
  if status == 'queued' or status == 'canceled' then return end
  if status == 'started' and redis.call('EXISTS', owner_key(id)) == 1 then return end
  local is_there = redis.call('EXISTS', job_key(id)) == 1
  if is_there and redis.call('HEXISTS', job_key(id), 'has_ended') == 0 then
    refuse('its status is not that of a request that waits')
  end
end
