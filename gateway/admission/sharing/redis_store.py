"""Shares of limits for the gateways of many machines, in Redis or Valkey: one script, so that every round is atomic there.

The script has the rules of `gateway.admission.sharing.ledger.settle`; the time is the server's own. Times and units travel as JSON
numbers. What nobody touches any more expires by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis.asyncio as aioredis
from redis.exceptions import RedisError

from gateway.admission.sharing.ledger import Grant, Report
from gateway.errors import StoreUnavailable

TIMEOUT_SECONDS = 1.0

_SCRIPT = """
local function sum(list, from)
  local total = 0
  for _, e in ipairs(list) do if e[1] > from then total = total + e[2] end end
  return total
end

local function left_by(ghosts, other, held, till, seconds, now)
  local known = sum(held[3], till)
  for _, e in ipairs(held[3]) do
    if e[1] > now then ghosts[#ghosts + 1] = {e[1], e[2], other} end
  end
  if held[1] - known > 0 and till + seconds > now then
    ghosts[#ghosts + 1] = {till + seconds, held[1] - known, other}
  end
end

local function settle(key, r, process, leases, now, lease_seconds, peers)
  local raw = redis.call('GET', key)
  local state = raw and cjson.decode(raw) or {h = {}, g = {}, b = now}
  local ghosts, held, others_hold, others_want, others_spare = {}, {}, 0, 0, 0
  for _, g in ipairs(state.g) do
    if g[1] > now and g[3] ~= process then ghosts[#ghosts + 1] = g end
  end
  for other, h in pairs(state.h) do
    if other ~= process then
      local till = leases[other] or 0
      if till <= now then
        left_by(ghosts, other, h, math.min(till, now), r.seconds, now)
      else
        held[other] = h
        others_hold = others_hold + h[1]
        others_want = others_want + h[2]
        others_spare = others_spare + math.max(0, h[1] - sum(h[3], now))
      end
    end
  end
  local used, floor = {}, 0
  for _, e in ipairs(r.used) do
    used[#used + 1] = {now + e[1], e[2]}
    floor = floor + e[2]
  end
  local free = math.max(0, r.limit - others_hold - sum(ghosts, -1))
  local ceiling = r.limit
  if now < state.b + lease_seconds and peers > 1 then ceiling = math.floor(r.limit / peers) end
  local before = state.h[process] and state.h[process][1] or 0
  local share = math.max(math.min(r.want, free, math.max(ceiling, before)), floor)
  if r.leaving then
    for _, e in ipairs(used) do ghosts[#ghosts + 1] = {e[1], e[2], ''} end
  else
    held[process] = {share, math.min(r.unmet, math.max(0, r.want - share)), used}
  end
  local encoded = cjson.encode({h = held, g = ghosts, b = state.b})
  redis.call('SET', key, encoded, 'PX', 2 * 86400 * 1000)
  local left = math.max(0, free - share)
  return {share, math.max(0, others_want - left), left + others_spare}
end

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local process, lease_seconds, peers = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('HSET', KEYS[1], process, string.format('%.6f', now + lease_seconds))
redis.call('PEXPIRE', KEYS[1], math.ceil((86400 + 2 * lease_seconds) * 1000))
local leases, living = {}, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  leases[all[i]] = tonumber(all[i + 1])
  if leases[all[i]] > now then
    living = living + 1
  elseif leases[all[i]] + 86400 + lease_seconds < now then
    redis.call('HDEL', KEYS[1], all[i])
  end
end
local grants = {}
for i, r in ipairs(cjson.decode(ARGV[4])) do
  grants[i] = settle(KEYS[i + 1], r, process, leases, now, lease_seconds, peers)
end
return cjson.encode({living = living, grants = grants})
"""


def _client(url: str) -> aioredis.Redis:
    """Raises StoreUnavailable without a cause: what urllib says of a wrong address repeats parts of the password in it."""
    try:
        return aioredis.Redis.from_url(url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS)
    except ValueError:
        raise StoreUnavailable(
            "the address of the store of limits makes no sense",
            where="gateway.shared_limits.url",
            remedy="Write redis://user:password@host:port/0 (rediss:// for TLS), a password's own signs as %2F for / and %40 for @.",
        ) from None


class RedisStore:
    """A `LimitStore` in the Redis or Valkey at `url`. Gateways of one fleet share a `prefix`.

    All keys carry the same hash tag, so that a cluster keeps them in one place, where a script may use them together.
    """

    def __init__(self, url: str, *, prefix: str = "sliceway") -> None:
        self._prefix = f"{{{prefix}}}:limits"
        self._client = _client(url)
        self._script = self._client.register_script(_SCRIPT)

    async def sync(
        self, process: str, reports: Sequence[Report], lease_seconds: float, peers: int
    ) -> tuple[Mapping[str, Grant], int]:
        """See LimitStore."""
        keys = [f"{self._prefix}:leases", *(f"{self._prefix}:of:{report.name}" for report in reports)]
        told = msgspec.json.encode([report._asdict() for report in reports]).decode()
        answer = await self._ask(self._script(keys=keys, args=[process, lease_seconds, peers, told]))
        decoded = msgspec.json.decode(answer)
        grants = decoded["grants"] or []
        return {r.name: Grant(*map(int, g)) for r, g in zip(reports, grants, strict=True)}, int(decoded["living"])

    async def leave(self, process: str) -> None:
        """See LimitStore."""
        await self._ask(self._client.hdel(f"{self._prefix}:leases", process))

    async def close(self) -> None:
        """See LimitStore."""
        await self._client.aclose()

    async def _ask(self, question: Any) -> Any:
        try:
            async with asyncio.timeout(2 * TIMEOUT_SECONDS):
                return await question
        except (RedisError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise StoreUnavailable(
                f"the store of limits does not answer: {type(error).__name__}",
                remedy="Check gateway.shared_limits.url, and that Redis or Valkey runs there.",
            ) from error
