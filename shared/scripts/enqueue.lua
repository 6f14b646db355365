-- Admission and enqueue in one step; the same id again is a success that changes nothing.
-- ARGV: id, base, queue, max depth of the queue, max depth in all, reader channel, stream ttl (ms), then the
--       job hash as field, value, ...
-- Returns {'queued'}, or {'full', depth, requests of the base that ended in the last minute or so}.
local id, base, queue = ARGV[1], ARGV[2], ARGV[3]

local function num_drained()
  local sum = 0
  for bucket = math.floor(now_ms / 10000) - 5, math.floor(now_ms / 10000) do
    sum = sum + tonumber(redis.call('GET', OURS .. ':drained:' .. base .. ':' .. bucket) or 0)
  end
  return sum
end

if redis.call('EXISTS', job_key(id)) == 1 then
  return { 'queued' }
end

local depth = redis.call('LLEN', queue_key(queue))
if depth >= tonumber(ARGV[4]) then
  return { 'full', depth, num_drained() }
end
local total = 0
for _, other in ipairs(redis.call('ZRANGE', waiting_key(base), 0, -1)) do
  total = total + redis.call('LLEN', queue_key(other))
end
if total >= tonumber(ARGV[5]) then
  return { 'full', total, num_drained() }
end

for i = 8, #ARGV, 2 do
  redis.call('HSET', job_key(id), ARGV[i], ARGV[i + 1])
end
redis.call('HSET', job_key(id), 'status', 'queued', 'origin', queue,
  'created_at', iso(now_us), 'enqueued_at', iso(now_us), 'enqueued_ms', now_ms, 'base', base)
redis.call('SADD', RQ .. ':queues', queue_key(queue))
redis.call('RPUSH', queue_key(queue), id)
redis.call('ZADD', waiting_key(base), 'NX', now_ms, queue)
redis.call('SET', reader_key(id), ARGV[6], 'PX', ARGV[7])
ring(base)
return { 'queued' }
