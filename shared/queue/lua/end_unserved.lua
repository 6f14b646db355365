-- Ends waiting requests for a weights version that no live worker has. If live workers serve a queue, its requests end
-- unless one of these workers has their version. If no live worker serves a queue, requests for the registered version
-- keep waiting, since a worker may come back, and requests for replaced or removed versions end.
-- ARGV: base, the calling worker, rank among the waiting queues at which to continue (-1 to begin), maximum number of
--       jobs to check in one call, minimum time (ms) between two runs by any workers, event (a format with one %d for
--       its number), exception text as in RQ's results, ttl (s) of a failed job.
-- Returns {rank at which to continue, or -1 if all queues were checked, ids of ended requests, unreadable}.
local base, worker, rank, budget = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local event, exc_text, failure_ttl = ARGV[6], ARGV[7], tonumber(ARGV[8])

local NOTHING = { -1, {}, unreadable }
if not holds_lease(base, worker) then return NOTHING end
local checked_at = shared_key('string', OURS .. ':judged:' .. base)
if rank < 0 then
  rank = 0
  if math.abs(now_ms - to_number(redis.call('GET', checked_at), 0)) < tonumber(ARGV[5]) then return NOTHING end
  redis.call('SET', checked_at, now_ms, 'PX', ARGV[5])
end

local live = redis.call('ZRANGEBYSCORE', workers_key(base), '(' .. now_ms, '+inf')
for _, name in ipairs(live) do
  -- A worker of an earlier release does not record what it serves and may have any version: no request is ended.
  if redis.call('EXISTS', served_key(name)) == 0 and redis.call('EXISTS', worker_key(name)) == 1 then
    return NOTHING
  end
end

-- Returns the set of weights versions that live workers have for a queue, and true if any live worker serves it.
local function weights_of(queue)
  local served, is_served = {}, false
  for _, name in ipairs(live) do
    local version = redis.call('HGET', served_key(name), queue)
    if version then served[version], is_served = true, true end
  end
  return served, is_served
end

-- Returns the registered weights version of a model, in the form of `weights_version` in shared/messages.py; '' if the
-- registry has no readable card.
local function registered_version(model)
  local text = redis.call('HGET', shared_key('hash', OURS .. ':models'), model)
  local ok, card = pcall(cjson.decode, text or '')
  if not ok or type(card) ~= 'table' or type(card.version) ~= 'string' then return '' end
  if type(card.adapter_name) ~= 'string' then return card.version end
  return tostring(card.base_version) .. '+' .. card.version
end

local ended = {}
local function check(id, queue, served, is_served)
  local status, version, model = unpack(redis.call('HMGET', job_key(id), 'status', 'version', 'model'))
  if status ~= 'queued' or not version or version == '' or served[version] or served[''] then return end
  if not is_served and registered_version(model or '') == version then return end
  unqueue(id, queue, 1)
  finish_ownerless(id, nobody(base, queue), event, { 'failed', '{}', '', exc_text, failure_ttl })
  drop_prompt(id)
  ended[#ended + 1] = id
end

while budget > 0 do
  local queue = redis.call('ZRANGE', waiting_key(base), rank, rank)[1]
  if not queue then return { -1, ended, unreadable } end
  local served, is_served = weights_of(queue)
  for _, id in ipairs(redis.call('LRANGE', queue_key(queue), 0, -1)) do
    guarded(id, base, queue, check, id, queue, served, is_served)
    budget = budget - 1
  end
  update_waiting(base, queue)
  if redis.call('ZSCORE', waiting_key(base), queue) then rank = rank + 1 end
end
return { rank, ended, unreadable }
