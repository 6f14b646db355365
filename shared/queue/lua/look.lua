-- Reads the requests from which a worker may choose: the first requests of some lines in some of the worker's queues,
-- in bounded time however many requests wait. A line is the waiting requests of one queue, class, weights version and
-- tenant.
-- ARGV: base, worker, schema version, maximum number of requests per line, maximum number of queues of `near` (and
--       again as many others), a random number (8 hex digits) by which tenants and queues are drawn, rank among the
--       waiting queues at which to continue, near = queues to read first because their adapters need no free slot,
--       others = the other queues of the worker, or {} for all of its `served` hash (both msgpack), maximum number of
--       long requests, of which 0 matters here: then long requests are passed over.
-- Returns {lines, rank at which to continue or -1 if this look is complete, now (ms), unreadable}. Per line {queue,
-- deadline (ms) of its first request or '', places ...}. The rank is -2 if the call found nothing because it removed as
-- many places without a request as a call may: the next look gets further.
local base, worker = ARGV[1], ARGV[2]
local max_requests, max_queues, tenant_point = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local rank, near, others = tonumber(ARGV[7]), cmsgpack.unpack(ARGV[8]), cmsgpack.unpack(ARGV[9])
local reader = new_reader(base, ARGV[3], ARGV[10])
local FIRST_PAGE, MAX_PAGES = 16, 6
local MAX_TENANTS, MAX_VERSIONS = 8, 4
-- Number of lines after which only one line of each class and version is read per further queue.
local MAX_LINES = 128

local lines = {}

-- Appends to `found` the distinct prefixes (`chars` characters) of the places between two texts, until it has `most`
-- prefixes.
local function distinct(key, from, to, chars, most, found)
  while #found < most do
    local place = redis.call('ZRANGE', key, from, to, 'BYLEX', 'LIMIT', 0, 1)[1]
    if not place then break end
    found[#found + 1] = place:sub(1, chars)
    from = '(' .. found[#found] .. '}'
  end
  return found
end

-- True if this worker has the weights for which the requests of a line wait.
local function fits(queue, line)
  local weights, version = reader.weights[queue], line:sub(3, 10)
  return weights == '' or version == NO_VERSION or version == version_part(weights)
end

-- Returns the prefixes `class|version|` of the requests that this worker can run.
local function versions_of(queue, key)
  local weights, found = reader.weights[queue], {}
  for _, class in ipairs({ '0', '1', '2' }) do
    if weights == '' then
      for _, version in ipairs(distinct(key, '[' .. class .. '|', '(' .. class .. '}', 11, MAX_VERSIONS, {})) do
        found[#found + 1] = version
      end
    else
      found[#found + 1] = class .. '|' .. version_part(weights) .. '|'
      found[#found + 1] = class .. '|' .. NO_VERSION .. '|'
    end
  end
  return found
end

-- Returns some lines of a queue: the line of the request that has waited longest, and for each class and version the
-- lines of some tenants, from a random point on.
local function some_lines(queue, key)
  local oldest = redis.call('LINDEX', queue_key(queue), 0)
  local place = oldest and redis.pcall('HGET', job_key(oldest), 'place')
  local found, is_there = {}, {}
  local function add(line)
    if not is_there[line] then
      is_there[line] = true
      found[#found + 1] = line
    end
  end
  for _, version in ipairs(versions_of(queue, key)) do
    if type(place) == 'string' and place:sub(1, #version) == version then add(place:sub(1, LINE_CHARS)) end
    local most = #lines < MAX_LINES and MAX_TENANTS or 1
    local point = version .. tenant_point
    local tenants = distinct(key, '[' .. point, '(' .. version .. '}', LINE_CHARS, most, {})
    for _, line in ipairs(distinct(key, '[' .. version, '(' .. point, LINE_CHARS, most, tenants)) do add(line) end
  end
  return found
end

local function add_line(queue, key, line, first)
  local place, _, job = first_of(reader, queue, line, first)
  if not place then return end
  local entry = { queue, job.deadline_ms or '', place }
  if max_requests > 1 then
    for _, other in ipairs(redis.call('ZRANGE', key, '(' .. place, '(' .. line .. '}', 'BYLEX', 'LIMIT', 0,
      max_requests - 1)) do
      if id_of(other) then entry[#entry + 1] = other end
    end
  end
  lines[#lines + 1] = entry
end

-- Adds the lines of a queue. The first and the last place tell whether there is only one line, as in most queues.
local function add_lines(queue, key)
  local first, last = redis.call('ZRANGE', key, 0, 0)[1], redis.call('ZRANGE', key, -1, -1)[1]
  if not first then return end
  local line = first:sub(1, LINE_CHARS)
  if last:sub(1, LINE_CHARS) ~= line then
    for _, other in ipairs(some_lines(queue, key)) do add_line(queue, key, other) end
  elseif fits(queue, line) then
    add_line(queue, key, line, first)
  end
end

local is_seen = {}

-- Adds the lines of a queue; returns true if this worker can run any request in it. If every place that was read had
-- lost its request, other requests may have lost their places: then the index is repaired and read again.
local function look_at(queue)
  is_seen[queue] = true
  local key, was_there = order_key(queue), #lines
  for _ = 1, 2 do
    mend_index(base, queue)
    add_lines(queue, key)
    if #lines > was_there then return true end
    if is_spent(reader) or redis.call('ZCARD', key) == redis.call('LLEN', queue_key(queue)) then break end
  end
  update_waiting(base, queue)
  return false
end

local function weights_of(queues)
  local unknown = {}
  for _, queue in ipairs(queues) do
    if reader.weights[queue] == nil then unknown[#unknown + 1] = queue end
  end
  local served = #unknown > 0 and redis.call('HMGET', served_key(worker), unpack(unknown)) or {}
  for i, queue in ipairs(unknown) do reader.weights[queue] = served[i] end
end

local score = {}

-- Returns the score of a queue in `waiting`, or nil if no request waits in the queue. The score is read only once: use
-- this function only for queues whose score this call of the script has not changed.
local function waits_since_ms(queue)
  if score[queue] == nil then score[queue] = tonumber(redis.call('ZSCORE', waiting_key(base), queue) or nil) or false end
  return score[queue] or nil
end

-- Reads queues in the given order, until `most` of them had requests for this worker or a limit is reached; skips
-- queues that were read before. Returns how many queues are still missing from `most`.
local function look_at_some(queues, most)
  weights_of(queues)
  for _, queue in ipairs(queues) do
    if most <= 0 or is_spent(reader) then break end
    if reader.weights[queue] and not is_seen[queue] and look_at(queue) then most = most - 1 end
  end
  return most
end

-- Reads the queues of `near`, whose adapters need no free slot; queues where only batch requests wait come last.
local function look_near()
  local waiting, only_batch = {}, {}
  for _, queue in ipairs(near) do
    if #waiting >= max_queues then break end
    local since_ms = waits_since_ms(queue)
    if since_ms then table.insert(since_ms < BATCH_OFFSET_MS and waiting or only_batch, queue) end
  end
  for _, queue in ipairs(only_batch) do waiting[#waiting + 1] = queue end
  look_at_some(waiting, max_queues)
end

-- Numbers of other queues to read: half have the oldest first requests, half are drawn at random. If no queue were
-- drawn, a few queues with thousands of old requests would hide all queues with younger requests.
local num_oldest = math.ceil(max_queues / 2)
local num_drawn = max_queues - num_oldest
local draw = tonumber(tenant_point, 16)

-- Reads some of the queues in `others`: the queues with the oldest first requests, then some drawn at random.
local function look_at_others()
  local waiting, since_ms, drawn = {}, {}, {}
  for _, queue in ipairs(others) do
    since_ms[queue] = waits_since_ms(queue)
    if since_ms[queue] then waiting[#waiting + 1] = queue end
  end
  table.sort(waiting, function(one, other) return since_ms[one] < since_ms[other] end)
  look_at_some(waiting, num_oldest)
  reader.num_passes_left = MAX_PASSES
  for i = 1, #waiting do drawn[i] = waiting[(draw + i) % #waiting + 1] end
  look_at_some(drawn, num_drawn)
end

-- Reads the waiting queues of the base with the oldest first requests. Each page is twice as large as the previous
-- page, because the worker may serve only few of the waiting queues.
local function look_at_oldest()
  local num_left, page = num_oldest, FIRST_PAGE
  for _ = 1, MAX_PAGES do
    local queues = redis.call('ZRANGE', waiting_key(base), rank, rank + page - 1)
    weights_of(queues)
    for _, queue in ipairs(queues) do
      if num_left <= 0 or is_spent(reader) then
        rank = -1
        return
      end
      rank = rank + 1
      if reader.weights[queue] and not is_seen[queue] then
        if look_at(queue) then
          num_left = num_left - 1
        elseif not redis.call('ZSCORE', waiting_key(base), queue) then
          rank = rank - 1
        end
      end
    end
    if #queues < page then
      rank = -1
      return
    end
    page = 2 * page
  end
end

-- Reads some more waiting queues of the base, from a random queue on.
local function look_at_drawn()
  local num_waiting = redis.call('ZCARD', waiting_key(base))
  if num_waiting == 0 or num_drawn == 0 then return end
  local first, page = draw % num_waiting, FIRST_PAGE + max_queues
  local num_left = look_at_some(redis.call('ZRANGE', waiting_key(base), first, first + page - 1), num_drawn)
  if first + page > num_waiting then
    look_at_some(redis.call('ZRANGE', waiting_key(base), 0, first + page - num_waiting - 1), num_left)
  end
end

if redis.call('EXISTS', RQ .. ':suspended') == 1 then return { {}, -1, now_ms, unreadable } end
local is_first = rank == 0
if is_first then look_near() end
-- Each part may pass over so many requests. If parts shared the number, requests that can't run could always use it up
-- in the same queues, and the queues drawn at random would never be read.
reader.num_passes_left = MAX_PASSES
if #others > 0 then
  look_at_others()
  rank = -1
else
  look_at_oldest()
  reader.num_passes_left = MAX_PASSES
  if is_first then look_at_drawn() end
end
if reader.num_removals_left <= 0 and #lines == 0 then rank = -2 end
return { lines, rank, now_ms, unreadable }
