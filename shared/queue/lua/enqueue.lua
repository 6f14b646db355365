-- Checks the queue limits and enqueues a request in one atomic step. A second call with the same id changes nothing.
-- ARGV: id, base, queue, maximum depth of the queue, maximum depth of all queues of the base together, reader channel,
--       stream ttl (ms), maximum time (ms) in the queue or 0 for no limit, then the job hash as field, value, ...
-- Returns {'queued'}, or {'full', depth, num_ended, over_ms}: num_ended requests of the base ended in the last over_ms.
-- over_ms is the time since the oldest waiting request was enqueued, but at most about a minute.
local id, base, queue = ARGV[1], ARGV[2], ARGV[3]

local function full(depth)
  local oldest = redis.call('ZRANGE', waiting_key(base), 0, 0, 'WITHSCORES')
  local since_ms = tonumber(oldest[2] or now_ms) % BATCH_OFFSET_MS
  local slice = math.floor(now_ms / 10000)
  local first, num_ended = math.max(slice - 5, math.floor(since_ms / 10000)), 0
  for number = first, slice do
    local drained = shared_key('string', OURS .. ':drained:' .. base .. ':' .. number)
    num_ended = num_ended + to_number(redis.call('GET', drained), 0)
  end
  return { 'full', depth, num_ended, now_ms - math.max(first * 10000, since_ms) }
end

local depth_key = shared_key('string', OURS .. ':depth:' .. base)

-- Returns the number of requests in all queues of the base. A count reads every waiting queue and is therefore used for
-- a second: new requests are added to it, but requests that left are not subtracted. If the number reaches the limit,
-- the queues are counted anew.
local function total_depth(limit)
  local known = to_number(redis.call('GET', depth_key))
  if known and known < limit then return known end
  local total = 0
  for _, other in ipairs(redis.call('ZRANGE', waiting_key(base), 0, -1)) do
    total = total + to_number(redis.pcall('LLEN', RQ .. ':queue:' .. other), 0)
  end
  redis.call('SET', depth_key, total, 'PX', 1000)
  return total
end

if redis.call('EXISTS', job_key(id)) == 1 then
  return { 'queued' }
end

local depth = redis.call('LLEN', queue_key(queue))
if depth >= tonumber(ARGV[4]) then
  return full(depth)
end
local total = total_depth(tonumber(ARGV[5]))
if total >= tonumber(ARGV[5]) then
  return full(total)
end
redis.call('SET', depth_key, total + 1, 'KEEPTTL')

local now = iso(now_us)
redis.call('HSET', job_key(id), unpack(ARGV, 9))
redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue,
  'created_at', now, 'enqueued_at', now, 'enqueued_ms', now_ms, 'base', base)
if ARGV[8] ~= '0' then redis.call('HSET', job_key(id), 'deadline_ms', now_ms + ARGV[8]) end
redis.call('SADD', shared_key('set', RQ .. ':queues'), queue_key(queue))
redis.call('RPUSH', queue_key(queue), id)
local place = make_place(id, false, now_us)
add_place(id, queue, place)
-- LT: if the queue is waiting already, its first request is older, and the queue's score stays. A first interactive
-- request lowers the score of a queue where only batch requests waited.
redis.call('ZADD', waiting_key(base), 'LT', now_ms + offset_ms(place), queue)
redis.call('SET', reader_key(id), ARGV[6], 'PX', ARGV[7])
ring(base)
return { 'queued' }
