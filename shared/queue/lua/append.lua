-- Writes the events of engine steps to the logs and publishes them; a terminal event ends the job of its request. Only
-- events with the owner's claim id are written. If the log already has an event, the event counts as written.
-- ARGV: base, lease (ms), stream ttl (ms), held = {id, claim id, ...} of all requests the worker holds,
--       appends = {{id, claim id, event_no, event, end}, ...}, both msgpack; end is nil or {status, meta,
--       return value, exception text, ttl (s)}, return value and exception text encoded as in RQ's results; number of
--       events after which a suspect is cleared; id of the request whose steps run alone from now on, or ''.
--       The status is one of RQ's, or 'refused' if the client has to correct its request, or to send it again.
-- Returns {aborted ids, lost ids, number of the base's queues with waiting requests, unreadable}.
local base, lease_ms, stream_ttl_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local held, appends = cmsgpack.unpack(ARGV[4]), cmsgpack.unpack(ARGV[5])
local num_events_to_clear, isolated = tonumber(ARGV[6]), ARGV[7]
-- Maximum number of arguments that one command gets from a table; even, because the arguments are pairs.
local MAX_FIELDS = 1000
local REMOVED = '{"event_no":%d,"finish_reason":"error","error":{"code":"generation_failed",'
  .. '"message":"The request was removed by an operator."}}'

local owners, aborted, lost, leases = {}, {}, {}, {}
for i = 1, #held, 2 do
  local id = held[i]
  local owner = guarded(id, base, nil, get_owner, id)
  if not owner or owner.claim_id ~= held[i + 1] then
    lost[#lost + 1] = id
  else
    owners[id] = owner
    table.insert(leases, now_ms + lease_ms)
    table.insert(leases, id)
    if owner.aborted then aborted[#aborted + 1] = id end
  end
end
for first = 1, #leases, MAX_FIELDS do
  redis.call('ZADD', leases_key(base), 'XX', unpack(leases, first, math.min(first + MAX_FIELDS - 1, #leases)))
end

if owners[isolated] then redis.call('HSET', owner_key(isolated), 'alone', 1) end

local lines = {}
local function write(id, event_no, event)
  local reader = write_event(id, event_no, event)
  if reader then
    lines[reader] = lines[reader] or {}
    table.insert(lines[reader], id .. ' ' .. event)
  end
end

-- True if the jobs of all requests that get an event exist, which is nearly always so.
local function all_jobs_exist()
  local ids, num_ids, job_keys = {}, 0, {}
  for _, entry in ipairs(appends) do
    if not ids[entry[1]] then
      ids[entry[1]], num_ids = true, num_ids + 1
      job_keys[num_ids] = job_key(entry[1])
    end
  end
  return num_ids > 0 and num_ids <= MAX_FIELDS and redis.call('EXISTS', unpack(job_keys)) == num_ids
end

local all_exist = all_jobs_exist()

local function append(id, owner, event_no, event, outcome)
  if not all_exist and redis.call('EXISTS', job_key(id)) == 0 then
    -- The job was deleted with RQ's tools, such as `rq empty` or a dashboard.
    write(id, event_no, REMOVED:format(event_no))
    redis.call('PEXPIRE', log_key(id), stream_ttl_ms)
    drop_ownership(id, owner)
    return false
  end
  write(id, event_no, event)
  if outcome then
    finish(id, owner, outcome)
    owners[id] = nil
  else
    redis.call('PEXPIRE', log_key(id), stream_ttl_ms)
    if owner.watched_from and event_no >= owner.watched_from + num_events_to_clear then
      redis.call('HDEL', job_key(id), 'crashes_alone', 'suspect')
      redis.call('HDEL', owner_key(id), 'watched_from', 'alone')
    end
  end
  return true
end

for _, entry in ipairs(appends) do
  local id, claim_id, event_no, event, outcome = unpack(entry, 1, 5)
  local owner = owners[id]
  -- If the claim id differs, the event is from an earlier claim, which this worker lost before it claimed again.
  if owner and owner.claim_id == claim_id then
    local is_kept = guarded(id, base, nil, append, id, owner, event_no, event, outcome)
    if not is_kept then
      owners[id] = nil
      lost[#lost + 1] = id
    end
  end
end
for reader, batch in pairs(lines) do
  redis.call('PUBLISH', reader, table.concat(batch, '\n'))
end
return { aborted, lost, redis.call('ZCARD', waiting_key(base)), unreadable }
