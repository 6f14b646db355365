-- Loaded between prelude.lua and scripts that change queues: the index of each queue, and the set of waiting queues.
--
-- RQ's list tells which requests wait in a queue. The index (a sorted set, all scores 0) holds the place of each of
-- these requests, i.e. its sort key: `class|version|tenant|priority|since|sequences|id` (shared/queue/places.py). A
-- script that removes a request from the list also removes its place; the job hash has a copy of the place. Earlier
-- releases and RQ's tools change only the list. Scripts therefore compare list and index, add missing places, and drop
-- places without a request.

-- Classes: 0 ran before and lost its worker, 1 interactive, 2 batch.
local BEGAN, BATCH = '0', '2'
local LINE_CHARS = 20
local ORDER = '^([12])|(%x%x%x%x%x%x%x%x)|(%d%d%d%d%d%d%d%d%d%d)|(%d%d%d%d%d%d)$'
local PLACE = '^[012]|%x%x%x%x%x%x%x%x|%x%x%x%x%x%x%x%x|%d%d%d%d%d%d%d%d%d%d|%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d|'
  .. '%d%d%d%d%d%d|(.*)$'
-- The `order` field for requests of an earlier release, which lack this field.
local DEFAULT_ORDER = '1|00000000|2147483648|000001'
local NO_VERSION = '00000000'
-- Maximum number of requests that one comparison reads from each end of a list.
local MAX_MENDED = 1000
-- Maximum number of requests that `update_waiting` removes from a list, and of entries that `trim_index` removes from each
-- end of an index. Without a limit, one call would stop the server for seconds if other programs left thousands of them.
local MAX_DROPPED = 500
-- Added to the scores in `waiting` of queues where only batch requests wait, so that these queues sort last.
local BATCH_OFFSET_MS = 2 ^ 50

local function offset_ms(first_place)
  return first_place and first_place:sub(1, 1) == BATCH and BATCH_OFFSET_MS or 0
end

-- The request id in a place; nil if the text is no place.
local function id_of(place) return place:match(PLACE) end

local function version_part(version)
  if not version or version == '' then return NO_VERSION end
  return redis.sha1hex(version):sub(1, 8)
end

-- Returns the place of a waiting job. `began`: true if the job ran before, false if not; if nil, the job's old place or
-- its log tells. `since_us`: the enqueue time of the job, by default the time in the job hash.
local function make_place(id, began, since_us)
  local place, order, version, enqueued_ms, has_ended =
    unpack(redis.call('HMGET', job_key(id), 'place', 'order', 'version', 'enqueued_ms', 'has_ended'))
  local class, tenant, priority, num_sequences = (order or DEFAULT_ORDER):match(ORDER)
  if not class then class, tenant, priority, num_sequences = DEFAULT_ORDER:match(ORDER) end
  local is_known = place and id_of(place) == id
  if began == nil then began = is_known and place:sub(1, 1) == BEGAN or redis.call('LLEN', log_key(id)) > 0 end
  if began and not has_ended then class = BEGAN end
  since_us = since_us or math.max(0, math.min(now_us, to_number(enqueued_ms, now_ms) * 1000))
  -- An earlier place has the time in microseconds, the job hash only in milliseconds.
  local since = is_known and place:sub(32, 47) or string.format('%016.0f', since_us)
  return table.concat({ class, version_part(version), tenant, priority, since, num_sequences, id }, '|')
end

-- Time to live of an index after a place was last added. Workers of earlier releases leave an index behind when they
-- empty the queue. If an index expires while requests wait, it is made again from the list.
local INDEX_TTL_S = 86400

-- Adds a place to the index and to the job hash. Returns true if the index had no such place.
local function add_place(id, queue, place)
  redis.call('HSET', job_key(id), 'place', place)
  local is_new = redis.call('ZADD', order_key(queue), 0, place) == 1
  redis.call('EXPIRE', order_key(queue), INDEX_TTL_S)
  return is_new
end

-- Requests that a worker of another class (a stock `rq worker`) took. Such a worker can't run them: it marks the job as
-- started, then as ended. It writes neither an owner nor `has_ended`, which our workers write. If it was stopped in
-- between, it may write so late that the request waits or runs again.

-- Returns the status of a request that another worker took and that neither runs nor has ended; nil for other requests.
local function taken_status(id)
  local TAKEN = { started = true, failed = true, finished = true, stopped = true }
  local status, base, has_ended, request =
    unpack(redis.call('HMGET', job_key(id), 'status', 'base', 'has_ended', 'request'))
  if not TAKEN[status] or not base or not request or request == '' or has_ended then return nil end
  return redis.call('EXISTS', owner_key(id)) == 0 and status or nil
end

-- Makes the job of a request one that waits, whatever another worker wrote to it. Without PERSIST, the job would expire.
local function reset_job(id, queue)
  redis.call('HDEL', job_key(id), 'ended_at', 'stuck_since_ms')
  redis.call('HSET', job_key(id), 'status', 'queued', 'worker_name', '', 'started_at', '')
  redis.call('PERSIST', job_key(id))
  redis.call('DEL', results_key(id))
  for _, name in ipairs({ 'failed', 'finished' }) do redis.call('ZREM', registry_key(name, queue), id) end
end

-- The list beside a queue's to which a stock worker moves the id of a request until it marks the job as started.
local function intermediate_key(queue) return shared_key('list', RQ .. ':queue:' .. queue .. ':intermediate') end

-- Puts a request at the front of its queue's list, and at its place in the index.
local function put_back(id, queue)
  reset_job(id, queue)
  redis.call('LREM', intermediate_key(queue), 0, id)
  redis.call('LREM', queue_key(queue), 0, id)
  redis.call('LPUSH', queue_key(queue), id)
  add_place(id, queue, make_place(id))
end

-- Checks that a request in the list has its place; removes the request from the list if the job is not queued any more.
-- `count`: as in LREM, 1 to search the list from the front, -1 from the back. Returns {status, enqueue time (ms), true if
-- something was repaired}.
local function check_place(id, queue, count)
  local status, enqueued_ms, place, has_ended =
    unpack(redis.call('HMGET', job_key(id), 'status', 'enqueued_ms', 'place', 'has_ended'))
  if status ~= 'queued' and taken_status(id) then
    reset_job(id, queue)
    status = 'queued'
  end
  check_status(id, status)
  local is_mended
  if status ~= 'queued' then
    unqueue(id, queue, count)
    is_mended = true
  elseif place and id_of(place) == id and not has_ended then
    is_mended = redis.call('ZADD', order_key(queue), 'NX', 0, place) == 1
    if is_mended then redis.call('EXPIRE', order_key(queue), INDEX_TTL_S) end
  else
    is_mended = add_place(id, queue, make_place(id))
  end
  return { status, enqueued_ms, is_mended }
end

-- Compares the lengths of index and list, and adds missing places: first for requests at the back of the list, where
-- APIs of earlier releases put requests, then for requests at its front.
local function mend_index(base, queue)
  local num_missing = redis.call('LLEN', queue_key(queue)) - redis.call('ZCARD', order_key(queue))
  local from_back = -1
  for _ = 1, math.min(num_missing, MAX_MENDED) do
    local id = redis.call('LINDEX', queue_key(queue), from_back)
    if not id then return end
    local checked = guarded(id, base, queue, check_place, id, queue, -1)
    if checked and not checked[3] then break end
    num_missing = num_missing - 1
    if checked and checked[1] == 'queued' then from_back = from_back - 1 end
  end
  if num_missing <= 0 then return end
  for _, id in ipairs(redis.call('LRANGE', queue_key(queue), 0, MAX_MENDED - 1)) do
    local checked = guarded(id, base, queue, check_place, id, queue, 1)
    if not checked or checked[3] then num_missing = num_missing - 1 end
    if num_missing == 0 then return end
  end
end

local take_back

-- Drops places whose requests do not wait any more, if there are more places than requests; at most 100 in a call.
local function trim_index(queue)
  local key = order_key(queue)
  -- Foreign entries whose score is not 0 sort to the ends. If these entries stayed, BYLEX searches would miss places.
  for _, position in ipairs({ 0, -1 }) do
    for _ = 1, MAX_DROPPED do
      local place, score = unpack(redis.call('ZRANGE', key, position, position, 'WITHSCORES'))
      if not place or (score == '0' and id_of(place)) then break end
      redis.call('ZREM', key, place)
    end
  end
  if redis.call('ZCARD', key) <= redis.call('LLEN', queue_key(queue)) then return end
  for _, place in ipairs(redis.call('ZRANGE', key, 0, 99)) do
    local id = id_of(place)
    local job = id and redis.pcall('HMGET', job_key(id), 'status', 'place')
    local is_own = job and not job.err and job[2] == place
    if not is_own or job[1] ~= 'queued' then redis.call('ZREM', key, place) end
    if is_own and job[1] ~= 'queued' then guarded(id, '', queue, take_back, id) end
  end
end

-- Removes, from the front of a queue's list, requests whose jobs are not queued any more; then sets the score of the
-- queue in `waiting` to the enqueue time of its first request. If there are too many for one call, the queue stays in
-- `waiting`, or gets into it, and the next call removes more.
local function update_waiting(base, queue)
  for _ = 1, MAX_DROPPED do
    local head = redis.call('LINDEX', queue_key(queue), 0)
    if not head then
      redis.call('DEL', order_key(queue))
      return redis.call('ZREM', waiting_key(base), queue)
    end
    local job = guarded(head, base, queue, check_place, head, queue, 1)
    if job and job[1] == 'queued' then
      local first = redis.call('ZRANGE', order_key(queue), 0, 0)[1]
      return redis.call('ZADD', waiting_key(base), to_number(job[2], now_ms) + offset_ms(first), queue)
    end
  end
  redis.call('ZADD', waiting_key(base), 'NX', now_ms, queue)
end

local ABORTED = '{"event_no":%d,"finish_reason":"abort","usage":{"prompt_tokens":0,"completion_tokens":0}}'

-- Puts a running request back at the front of its queue. The request's log stays, and the next worker continues after
-- its last event. If the request was aborted, it ends instead.
local function requeue(id, owner)
  if redis.call('EXISTS', job_key(id)) == 0 then return drop_ownership(id, owner) end
  if owner.aborted then
    return finish_ownerless(id, owner, ABORTED, { 'canceled', '{}', '', '', 60 })
  end
  local origin, base = unpack(redis.call('HMGET', job_key(id), 'origin', 'base'))
  if origin ~= owner.queue or base ~= owner.base then refuse('its job and its owner name two queues') end
  drop_ownership(id, owner)
  reset_job(id, owner.queue)
  -- The deadline is for the first start of the request, and this request has started in time.
  redis.call('HDEL', job_key(id), 'deadline_ms')
  redis.call('LPUSH', queue_key(owner.queue), id)
  add_place(id, owner.queue, make_place(id, true))
  update_waiting(owner.base, owner.queue)
  ring(owner.base)
end

local MAX_NUM_TAKEN = 10

-- Puts a request back on its queue that a worker of another class took and ended. Returns 'queued' if the request waits
-- again, 'taken' if this has happened MAX_NUM_TAKEN times before, 'other' if it was not taken, or was only begun: such a
-- worker ends it within milliseconds, or else sweep.lua puts it back.
function take_back(id)
  local status = taken_status(id)
  if not status or status == 'started' then return 'other' end
  if increment(job_key(id), 'taken') > MAX_NUM_TAKEN then return 'taken' end
  local queue, base = unpack(redis.call('HMGET', job_key(id), 'origin', 'base'))
  put_back(id, queue)
  update_waiting(base, queue)
  ring(base)
  return 'queued'
end

local QUEUE_TIMEOUT, QUEUE_TIMEOUT_RESULT = '@QUEUE_TIMEOUT@', '@QUEUE_TIMEOUT_RESULT@'

-- Ends a waiting request whose deadline has passed, and then returns true. Requests that an operator requeued have no
-- deadline.
local function end_overdue(id, base, queue)
  local deadline_ms, has_ended = unpack(redis.call('HMGET', job_key(id), 'deadline_ms', 'has_ended'))
  if has_ended or to_number(deadline_ms, now_ms) >= now_ms then return false end
  unqueue(id, queue, 0)
  finish_ownerless(id, nobody(base, queue), QUEUE_TIMEOUT,
    { 'failed', '{}', '', QUEUE_TIMEOUT_RESULT, keep_failed_s(id) })
  drop_prompt(id)
  return true
end
