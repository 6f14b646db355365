-- Reads what a worker may choose from: the first requests of some lines of some of its queues, in bounded time however
-- many wait. A line is the requests of one queue, class, weights version and tenant.
-- ARGV: base, worker, schema version, most requests of a line, most other queues, most queues of the worker, a random
--       point among the tenants (8 hex digits), rank among the waiting queues to go on at, then the queues that come
--       first because they need no free slot. The queues that the worker serves stand in its `served` hash.
-- Returns {lines, rank to go on at or -1 if that was enough, now (ms), unreadable}. Per line {queue, deadline (ms) of
-- its first request or '', places ...}.
local base, worker = ARGV[1], ARGV[2]
local max_requests, max_others, max_near = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local tenant_point, rank = ARGV[7], tonumber(ARGV[8])
local NUM_ARGS = 8
local reader = { base = base, schema_version = tonumber(ARGV[3]), weights = {} }
local PAGE, MAX_PAGES = 100, 10
local MAX_TENANTS, MAX_VERSIONS = 8, 4
-- If this number of lines was found, further queues show one line of each class and version only.
local MAX_LINES = 128

local lines = {}

-- The distinct prefixes of `chars` characters in an index between two texts; at most `most`.
local function distinct(key, from, to, chars, most, found)
  while #found < most do
    local place = redis.call('ZRANGE', key, from, to, 'BYLEX', 'LIMIT', 0, 1)[1]
    if not place then break end
    found[#found + 1] = place:sub(1, chars)
    from = '(' .. found[#found] .. '}'
  end
  return found
end

-- The prefixes `class|version|` of requests that this worker can run.
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

-- The line of the request that has waited longest, then for each class and version the lines of some tenants, starting
-- at a random point.
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

-- The first (0) or last (-1) place of an index, or nil. Entries with another score are removed: searches by text need
-- equal scores, and such entries would hide the others.
local function place_at(key, position)
  while true do
    local place, score = unpack(redis.call('ZRANGE', key, position, position, 'WITHSCORES'))
    if not place or (score == '0' and id_of(place)) then return place end
    redis.call('ZREM', key, place)
  end
end

-- The lines of a queue to look at. Most queues have only one.
local function lines_of(queue)
  local key = order_key(queue)
  local first, last = place_at(key, 0), place_at(key, -1)
  if not first then return {} end
  local line = first:sub(1, LINE_CHARS)
  if last:sub(1, LINE_CHARS) == line then return { line } end
  return some_lines(queue, key)
end

local function add_lines(queue)
  local was_there = #lines
  for _, line in ipairs(lines_of(queue)) do
    local place, _, job = first_of(reader, queue, line)
    if place then
      local entry = { queue, job.deadline_ms or '', place }
      if max_requests > 1 then
        local more = redis.call('ZRANGE', order_key(queue), '(' .. place, '(' .. line .. '}', 'BYLEX', 'LIMIT', 0,
          max_requests - 1)
        for _, other in ipairs(more) do
          if id_of(other) then entry[#entry + 1] = other end
        end
      end
      lines[#lines + 1] = entry
    end
  end
  return #lines > was_there
end

local is_seen = {}

-- Adds the lines of a queue; returns true if this worker can run any of its requests. If all places that it met had
-- lost their requests, the queue may have requests without places: the index is mended and read again.
local function look_at(queue)
  is_seen[queue] = true
  mend_index(base, queue)
  if add_lines(queue) then return true end
  mend_index(base, queue)
  if add_lines(queue) then return true end
  update_waiting(base, queue)
  return false
end

local function weights_of(queues)
  local served = #queues > 0 and redis.call('HMGET', served_key(worker), unpack(queues)) or {}
  for i, queue in ipairs(queues) do reader.weights[queue] = served[i] end
end

local function look_near()
  local near, num_found = {}, 0
  for i = NUM_ARGS + 1, #ARGV do near[#near + 1] = ARGV[i] end
  weights_of(near)
  for _, queue in ipairs(near) do
    if num_found >= max_near then return end
    if reader.weights[queue] and redis.call('ZSCORE', waiting_key(base), queue) and look_at(queue) then
      num_found = num_found + 1
    end
  end
end

-- The other queues, oldest head first.
local function look_further()
  local num_found = 0
  for _ = 1, MAX_PAGES do
    local queues = redis.call('ZRANGE', waiting_key(base), rank, rank + PAGE - 1)
    weights_of(queues)
    for _, queue in ipairs(queues) do
      if num_found >= max_others then
        rank = -1
        return
      end
      rank = rank + 1
      if reader.weights[queue] and not is_seen[queue] then
        if look_at(queue) then
          num_found = num_found + 1
        elseif not redis.call('ZSCORE', waiting_key(base), queue) then
          rank = rank - 1
        end
      end
    end
    if #queues < PAGE then
      rank = -1
      return
    end
  end
end

if redis.call('EXISTS', RQ .. ':suspended') == 1 then return { {}, -1, now_ms, unreadable } end
if rank == 0 then look_near() end
if max_others > 0 then look_further() else rank = -1 end
return { lines, rank, now_ms, unreadable }
