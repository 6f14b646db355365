-- A draining worker gives requests back: to the front of their queues, with what is written of them.
-- ARGV: base, held = {id, execution, ...} (msgpack), newest first, so that the oldest ends up in front.
-- Returns {how many it still owned, unreadable}.
local base, held = ARGV[1], cmsgpack.unpack(ARGV[2])
local count = 0
for i = 1, #held, 2 do
  local id, execution = held[i], held[i + 1]
  local is_owned = guarded(id, base, nil, function()
    local owner = get_owner(id)
    if owner.execution ~= execution then return false end
    requeue(id, owner)
    return true
  end)
  if is_owned then count = count + 1 end
end
return { count, unreadable }
