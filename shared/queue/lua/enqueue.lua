-- Checks the queue limits and enqueues a request in one atomic step. A second call with the same id changes nothing.
-- ARGV: id, base, queue, limits (msgpack), reader channel, stream ttl (ms), maximum time (ms) in the queue or 0 for no
--       limit, then the job hash as field, value, ...
--       limits = {depth of the queue, depth of all queues of the base together, bytes of all requests that wait for the
--       base, and the same three for the requests of one tenant}.
-- Returns {'queued'}, or {'full', what, number, num_ended, over_ms}. `what` is the limit that was reached: 'requests',
-- 'bytes', 'requests of tenant' or 'bytes of tenant'; `number` is what waits already. num_ended requests of the base
-- ended in the last over_ms: the time since the oldest waiting request was enqueued, but at most about a minute.
local id, base, queue = ARGV[1], ARGV[2], ARGV[3]

local limits = cmsgpack.unpack(ARGV[4])
local NUM_ARGS = 7

local function full(what, number)
  local oldest = redis.call('ZRANGE', waiting_key(base), 0, 0, 'WITHSCORES')
  local since_ms = tonumber(oldest[2] or now_ms) % BATCH_OFFSET_MS
  local slice = math.floor(now_ms / 10000)
  local first, num_ended = math.max(slice - 5, math.floor(since_ms / 10000)), 0
  for number = first, slice do
    local drained = shared_key('string', OURS .. ':drained:' .. base .. ':' .. number)
    num_ended = num_ended + to_number(redis.call('GET', drained), 0)
  end
  return { 'full', what, number, num_ended, now_ms - math.max(first * 10000, since_ms) }
end

local job = {}
for i = NUM_ARGS + 1, #ARGV, 2 do job[ARGV[i]] = ARGV[i + 1] end
local _, tenant = job.order:match(ORDER)
local backlog_key = shared_key('hash', OURS .. ':backlog:' .. base)
local TOTAL = 'total'

-- Raises an error if the server has no free memory. It refuses only the first write of a script, and only if that write
-- can take memory. So this write must come before any that frees memory.
local function require_memory() redis.call('HSET', backlog_key, 'again_ms', now_ms) end

-- Reads all requests that wait for the base, and notes their bytes and their number by tenant in `backlog`.
local function count_backlog()
  local bytes, num, num_read = { [TOTAL] = 0 }, { [TOTAL] = 0 }, 0
  for _, other in ipairs(redis.call('ZRANGE', waiting_key(base), 0, -1)) do
    local ids = redis.pcall('LRANGE', RQ .. ':queue:' .. other, 0, -1)
    for _, waiting in ipairs(ids.err and {} or ids) do
      local found = redis.pcall('HMGET', job_key(waiting), 'bytes', 'order')
      local _, owner = (not found.err and found[2] or DEFAULT_ORDER):match(ORDER)
      for _, name in ipairs({ TOTAL, owner }) do
        bytes[name] = (bytes[name] or 0) + to_number(not found.err and found[1], 0)
        num[name] = (num[name] or 0) + 1
      end
      num_read = num_read + 1
    end
  end
  require_memory()
  redis.call('DEL', backlog_key)
  -- If all requests were read each time that a limit is reached, a full queue would keep the server busy. The pause is
  -- 1 ms for each request, so that reading them takes a few hundredths of the time.
  redis.call('HSET', backlog_key, 'again_ms', now_ms + num_read)
  for name, number in pairs(bytes) do redis.call('HSET', backlog_key, name, number, name .. ':num', num[name]) end
  -- APIs of an earlier release enqueue without adding to these numbers.
  redis.call('EXPIRE', backlog_key, 60)
end

-- Returns bytes and number of the waiting requests: of the base, then of the tenant. Requests that have left since the
-- last count are still in these numbers, so they are counted anew if a limit is reached.
local function backlog(may_count)
  local again_ms, bytes, num, own_bytes, own_num = unpack(redis.call('HMGET', backlog_key, 'again_ms', TOTAL,
    TOTAL .. ':num', tenant, tenant .. ':num'))
  local function is_over(number, more, limit) return to_number(number, 0) > 0 and number + more > limit end
  local is_known = again_ms and bytes
  local may_refuse = is_known and (is_over(bytes, job.bytes, limits[3]) or is_over(own_bytes, job.bytes, limits[6])
    or is_over(own_num, 1, limits[5]))
  if may_count and (not is_known or (may_refuse and now_ms >= to_number(again_ms, 0))) then
    count_backlog()
    return backlog(false)
  end
  return { bytes = to_number(bytes, 0), num = to_number(num, 0), own_bytes = to_number(own_bytes, 0),
    own_num = to_number(own_num, 0), is_over = is_over }
end

-- Returns the number of requests in all queues of the base, which are counted anew if `known` reaches the limit.
local function total_depth(known, limit)
  if known < limit then return known end
  local total = 0
  for _, other in ipairs(redis.call('ZRANGE', waiting_key(base), 0, -1)) do
    total = total + to_number(redis.pcall('LLEN', RQ .. ':queue:' .. other), 0)
  end
  redis.call('HSET', backlog_key, TOTAL .. ':num', total)
  return total
end

-- True if the index has more places than the list has requests: some places have lost their request.
local function has_stale_places() return redis.call('ZCARD', order_key(queue)) > redis.call('LLEN', queue_key(queue)) end

-- True if the tenant has `limit` requests in the queue, in the class and version of this request. Places without a
-- request, which workers of an earlier release leave, must refuse nobody: they are dropped, and while there are too
-- many for one call, the limit on the tenant's requests in all queues together has to suffice.
local function has_places(limit)
  local line = table.concat({ job.order:sub(1, 1), version_part(job.version), tenant }, '|') .. '|'
  local function is_over()
    return redis.call('ZRANGE', order_key(queue), '[' .. line, '(' .. line .. '}', 'BYLEX', 'LIMIT', limit - 1, 1)[1]
  end
  if not is_over() then return false end
  if not has_stale_places() then return true end
  require_memory()
  trim_index(queue)
  return not has_stale_places() and is_over()
end

if redis.call('EXISTS', job_key(id)) == 1 then
  return { 'queued' }
end

local depth = redis.call('LLEN', queue_key(queue))
if depth >= limits[1] then return full('requests', depth) end
if depth >= limits[4] and has_places(limits[4]) then return full('requests of tenant', limits[4]) end
local known = backlog(true)
local total = total_depth(known.num, limits[2])
if total >= limits[2] then return full('requests', total) end
if known.is_over(known.bytes, job.bytes, limits[3]) then return full('bytes', known.bytes) end
if known.is_over(known.own_bytes, job.bytes, limits[6]) then return full('bytes of tenant', known.own_bytes) end
if known.is_over(known.own_num, 1, limits[5]) then return full('requests of tenant', known.own_num) end
redis.call('HSET', backlog_key, TOTAL, known.bytes + job.bytes, TOTAL .. ':num', total + 1,
  tenant, known.own_bytes + job.bytes, tenant .. ':num', known.own_num + 1)

local now = iso(now_us)
redis.call('HSET', job_key(id), unpack(ARGV, NUM_ARGS + 1))
redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue,
  'created_at', now, 'enqueued_at', now, 'enqueued_ms', now_ms, 'base', base)
if ARGV[7] ~= '0' then redis.call('HSET', job_key(id), 'deadline_ms', now_ms + ARGV[7]) end
redis.call('SADD', shared_key('set', RQ .. ':queues'), queue_key(queue))
redis.call('RPUSH', queue_key(queue), id)
local place = make_place(id, false, now_us)
add_place(id, queue, place)
-- LT: if the queue is waiting already, its first request is older, and the queue's score stays. A first interactive
-- request lowers the score of a queue where only batch requests waited.
redis.call('ZADD', waiting_key(base), 'LT', now_ms + offset_ms(place), queue)
redis.call('SET', reader_key(id), ARGV[5], 'PX', ARGV[6])
ring(base)
return { 'queued' }
