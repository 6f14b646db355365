-- Aborts a request whose client disconnected or canceled it. A queued request is removed and never starts; a running
-- request is flagged, so that its worker ends it.
-- ARGV: id, '1' to leave a running request alone, ttl (s) of the canceled job.
-- Returns the state in which the request was: 'queued', 'running' or 'gone'. 'queued' includes requests that a stock
-- worker took, since they would wait again, and those that an earlier call removed, since a call may be repeated.
local id, only_queued, ttl = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])

local function cancel(queue, base)
  unqueue(id, queue, 0)
  redis.call('HSET', job_key(id), 'status', 'canceled', 'ended_at', iso(now_us))
  drop_prompt(id)
  redis.call('EXPIRE', job_key(id), ttl)
  redis.call('ZADD', registry_key('canceled', queue), math.floor(now_ms / 1000) + ttl, id)
  redis.call('DEL', reader_key(id), log_key(id))
  update_waiting(base, queue)
end

local function abort()
  local status, queue, base, has_ended = unpack(redis.call('HMGET', job_key(id), 'status', 'origin', 'base', 'has_ended'))
  if status and redis.call('EXISTS', owner_key(id)) == 1 then
    if not only_queued then redis.call('HSET', owner_key(id), 'aborted', 1) end
    return 'running'
  elseif status == 'queued' then
    cancel(queue, base)
    return 'queued'
  elseif taken_status(id) then
    reset_job(id, queue)
    cancel(queue, base)
    return 'queued'
  end
  local was_canceled_here = status == 'canceled' and not has_ended and redis.call('HGET', job_key(id), 'request') == ''
  return was_canceled_here and 'queued' or 'gone'
end

return guarded(id, '', nil, abort) or 'gone'
