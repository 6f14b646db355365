-- The events of one engine step into the logs, and to the APIs that read them; a terminal event ends its job.
-- Fenced: only the owner's events count. What stands in a log already succeeds, once.
-- ARGV: worker, lease (ms), stream ttl (ms), held = {id, execution, ...} of all requests the worker holds,
--       appends = {{id, execution, event_no, event, end}, ...}, both msgpack; end is nil or {status, meta,
--       return value, exception text, ttl (s)}, the middle two encoded as RQ's results have them.
-- Returns {aborted ids, lost ids}.
local worker, lease_ms, stream_ttl_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local held, appends = cmsgpack.unpack(ARGV[4]), cmsgpack.unpack(ARGV[5])
local RESULT_TYPE = { finished = 1, failed = 2 }

local function write_result(id, owner, started, status, return_value, exc_text, ttl)
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

local function count_job(worker, status, working_s)
  if redis.call('EXISTS', worker_key(worker)) == 1 then
    local counter = status == 'failed' and 'failed_job_count' or 'successful_job_count'
    redis.call('HINCRBY', worker_key(worker), counter, 1)
    redis.call('HINCRBYFLOAT', worker_key(worker), 'total_working_time', working_s)
  end
end

local function finish(id, owner, outcome)
  local status, meta, return_value, exc_text, ttl = unpack(outcome)
  local created = redis.call('HGET', RQ .. ':execution:' .. id .. ':' .. owner.execution, 'created_at')
  local started = tonumber(created or now_us / 1000000)
  redis.call('HSET', job_key(id), 'status', status, 'ended_at', iso(now_us), 'meta', meta)
  redis.call('ZADD', RQ .. ':' .. status .. ':' .. owner.queue, math.floor(now_ms / 1000) + ttl, id)
  if RESULT_TYPE[status] then
    write_result(id, owner, started, status, return_value, exc_text, ttl)
  end
  drop_execution(id, owner)
  count_job(owner.worker, status, now_us / 1000000 - started)
  for _, key in ipairs({ job_key(id), log_key(id), reader_key(id) }) do
    redis.call('EXPIRE', key, ttl)
  end
end

local owners, aborted, lost = {}, {}, {}
for i = 1, #held, 2 do
  local id, owner = held[i], get_owner(held[i])
  if owner.execution ~= held[i + 1] then
    lost[#lost + 1] = id
  else
    owners[id] = owner
    redis.call('ZADD', leases_key(owner.base), 'XX', now_ms + lease_ms, id)
    if owner.aborted then aborted[#aborted + 1] = id end
  end
end

local lines = {}
for _, entry in ipairs(appends) do
  local id, _, event_no, event, outcome = unpack(entry, 1, 5)
  local owner = owners[id]
  if owner and redis.call('EXISTS', job_key(id)) == 0 then
    -- Removed from outside (`rq empty`, a dashboard): nobody waits for it under its id any more.
    drop_execution(id, owner)
    owners[id] = nil
    lost[#lost + 1] = id
  elseif owner then
    if event_no == redis.call('LLEN', log_key(id)) then
      redis.call('RPUSH', log_key(id), event)
      local reader = redis.call('GET', reader_key(id))
      if reader then
        lines[reader] = lines[reader] or {}
        table.insert(lines[reader], id .. ' ' .. event)
      end
    end
    if outcome then
      finish(id, owner, outcome)
      owners[id] = nil
    else
      redis.call('PEXPIRE', log_key(id), stream_ttl_ms)
    end
  end
end
for reader, batch in pairs(lines) do
  redis.call('PUBLISH', reader, table.concat(batch, '\n'))
end
return { aborted, lost }
