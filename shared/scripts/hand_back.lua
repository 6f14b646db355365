-- A draining worker gives requests back: to the front of their queues, with what is written of them.
-- ARGV: held = {id, execution, ...} (msgpack), newest first, so that the oldest ends up in front.
-- Returns how many it still owned.
local held = cmsgpack.unpack(ARGV[1])
local count = 0
for i = 1, #held, 2 do
  local owner = get_owner(held[i])
  if owner.execution == held[i + 1] then
    requeue(held[i], owner)
    count = count + 1
  end
end
return count
