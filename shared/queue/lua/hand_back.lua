-- Puts requests of a live worker back at the front of their queues; their logs stay.
-- ARGV: base, held = {id, claim id, ...} (msgpack), newest first, so that the oldest ends up in front.
-- Returns {number of requests put back: those that the worker still owned, unreadable}.
local base, held = ARGV[1], cmsgpack.unpack(ARGV[2])
local count = 0

local function hand_back(id, claim_id)
  local owner = get_owner(id)
  if owner.claim_id ~= claim_id then return false end
  requeue(id, owner)
  return true
end

for i = 1, #held, 2 do
  if guarded(held[i], base, nil, hand_back, held[i], held[i + 1]) then count = count + 1 end
end
return { count, unreadable }
