-- One heartbeat of a worker: its own entry and the leases of all it holds.
-- ARGV: base, worker, lease (ms), held = {id, execution, ...} (msgpack). Returns {aborted ids, lost ids}.
local base, worker, lease_ms, held = ARGV[1], ARGV[2], tonumber(ARGV[3]), cmsgpack.unpack(ARGV[4])

redis.call('ZADD', OURS .. ':workers:' .. base, now_ms + lease_ms, worker)
redis.call('ZREMRANGEBYSCORE', OURS .. ':workers:' .. base, '-inf', now_ms - 600000)

local aborted, lost = {}, {}
for i = 1, #held, 2 do
  local id, owner = held[i], get_owner(held[i])
  if owner.execution ~= held[i + 1] then
    lost[#lost + 1] = id
  else
    redis.call('ZADD', leases_key(base), now_ms + lease_ms, id)
    if owner.aborted then aborted[#aborted + 1] = id end
  end
end
return { aborted, lost }
