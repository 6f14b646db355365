-- Ends overdue requests at the front of queues. Workers do so too (claim.lua, sweep.lua), but only for their own base,
-- and maybe no worker of a base is alive. Requests of which an operator or a crash removed the deadline keep waiting.
-- ARGV: queues. Returns {ids of ended requests, unreadable}.
local MAX_NUM_CHECKED = 100
local ended = {}

local function end_in(queue)
  local bases = {}
  for _, id in ipairs(redis.call('LRANGE', queue_key(queue), 0, MAX_NUM_CHECKED - 1)) do
    local base = redis.pcall('HGET', job_key(id), 'base')
    -- Jobs without a base are not Lorelay's: other programs may use RQ in the same database.
    if type(base) == 'string' and guarded(id, base, queue, end_overdue, id, base, queue) then
      ended[#ended + 1] = id
      bases[base] = true
    end
  end
  for base in pairs(bases) do update_waiting(base, queue) end
end

for _, queue in ipairs(ARGV) do end_in(queue) end
return { ended, unreadable }
