-- Loaded before look.lua and claim.lua: finds the first request of a line that a worker can run. A line is the waiting
-- requests of one queue, class, weights version and tenant; its name is the prefix that their places (sort keys) share.

local MAX_PASSED = 64
-- Maximum numbers of requests that all lines together may pass over, and of places that a call may remove. Without
-- these limits, a call would take seconds if thousands of requests can't run, or are gone. To end an overdue request
-- takes as long as to remove so many other places.
local MAX_PASSES, MAX_REMOVED, COST_OF_END = 128, 500, 5

-- Returns a reader: a record of what the worker can run, and of how far this call may still search.
local function new_reader(base, schema_version, num_long)
  return { base = base, schema_version = tonumber(schema_version), num_long = tonumber(num_long), weights = {},
    num_passes_left = MAX_PASSES, num_removals_left = MAX_REMOVED }
end

-- True if a limit is reached, so that `first_of` finds nothing more.
local function is_spent(reader) return reader.num_passes_left <= 0 or reader.num_removals_left <= 0 end

-- Reads the fields that tell whether and how a request may run; not the request itself, which may be megabytes.
local function read_job(id)
  local job, schema_version = {}, nil
  job.status, job.place, schema_version, job.version, job.deadline_ms, job.crashes_alone, job.suspect, job.has_ended,
    job.base, job.bytes = unpack(redis.call('HMGET', job_key(id), 'status', 'place', 'schema_version', 'version',
      'deadline_ms', 'crashes_alone', 'suspect', 'has_ended', 'base', 'bytes'))
  job.schema_version = to_number(schema_version or 0) or refuse('its schema_version is no number')
  return job
end

-- Size (bytes) beyond which a request is long: its prompt takes a while to be encoded.
local LONG_REQUEST_BYTES = 32768

local function is_long(job) return to_number(job.bytes, 0) > LONG_REQUEST_BYTES end

-- True if a worker can run a job. `reader` has the worker's base, newest schema and weights version by queue, and the
-- number of long requests that it can take.
local function can_run(reader, job, queue)
  local has = reader.weights[queue]
  return job.schema_version <= reader.schema_version
    and (reader.num_long > 0 or not is_long(job))
    and (not job.version or job.version == '' or has == '' or job.version == has)
end

-- Removes a request that is not queued any more from its queue's list. If a worker of another class has taken the
-- request, it goes back.
local function drop_request(id, queue, status)
  if redis.call('LREM', queue_key(queue), 0, id) == 0 then return take_back(id) end
  if taken_status(id) then put_back(id, queue) else check_status(id, status) end
end

-- Returns place, id and job of the first request of a line that a worker can run, or nil. Skips requests of newer
-- schemas, ends overdue requests, and drops places without a queued request; returns nil, too, once `is_spent`. What
-- was removed is gone, so the next call gets further. `place`: the first place of the line, if the caller knows it.
local function first_of(reader, queue, line, place)
  local key, num_passed = order_key(queue), 0
  while num_passed < MAX_PASSED and not is_spent(reader) do
    place = place or redis.call('ZRANGE', key, '[' .. line, '(' .. line .. '}', 'BYLEX', 'LIMIT', num_passed, 1)[1]
    if not place then return nil end
    local id = id_of(place)
    local job = id and guarded(id, reader.base, queue, read_job, id)
    if not job or job.status ~= 'queued' or job.place ~= place then
      redis.call('ZREM', key, place)
      reader.num_removals_left = reader.num_removals_left - 1
      if job and job.status ~= 'queued' then guarded(id, reader.base, queue, drop_request, id, queue, job.status) end
    elseif not can_run(reader, job, queue) then
      num_passed = num_passed + 1
      reader.num_passes_left = reader.num_passes_left - 1
    elseif not job.deadline_ms or not guarded(id, reader.base, queue, end_overdue, id, reader.base, queue) then
      return place, id, job
    else
      reader.num_removals_left = reader.num_removals_left - COST_OF_END
    end
    place = nil
  end
end
