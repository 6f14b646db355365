-- Renews the leases of a worker and of all requests that it holds.
-- ARGV: base, worker, lease (ms), held = {id, claim id, ...} (msgpack), '1' to abort requests that are not detached and
--       whose API's lease has expired, ttl (ms) of the worker's `served` hash.
-- Returns {aborted ids, lost ids, 1 if the worker's own lease had not expired, else 0, unreadable, 1 if its `served`
-- hash still exists, else 0}.
local base, worker, lease_ms, held = ARGV[1], ARGV[2], tonumber(ARGV[3]), cmsgpack.unpack(ARGV[4])

local had_lease = holds_lease(base, worker)
redis.call('ZADD', workers_key(base), now_ms + lease_ms, worker)
redis.call('ZREMRANGEBYSCORE', workers_key(base), '-inf', now_ms - 600000)
-- The worker is alive: requests that were reaped from it during a pause must not count as running in a later crash.
redis.call('DEL', reaped_key(worker))

local function is_orphan(id)
  if ARGV[5] ~= '1' or not had_lease or redis.call('HGET', job_key(id), 'detached') == '1' then return false end
  local reader = redis.call('GET', reader_key(id))
  return not reader or redis.call('EXISTS', reader) == 0
end

local aborted, lost = {}, {}
local function renew(id, claim_id)
  local owner = get_owner(id)
  if owner.claim_id ~= claim_id then return false end
  redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
  if owner.aborted or is_orphan(id) then aborted[#aborted + 1] = id end
  return true
end

for i = 1, #held, 2 do
  local id, claim_id = held[i], held[i + 1]
  if not guarded(id, base, nil, renew, id, claim_id) then lost[#lost + 1] = id end
end
local has_served = redis.call('PEXPIRE', served_key(worker), ARGV[6])
return { aborted, lost, had_lease and 1 or 0, unreadable, has_served }
