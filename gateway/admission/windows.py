"""Sliding windows: at most so many units in any span of so many seconds. Time is an argument.

A token bucket lets twice its limit through in one minute (a full bucket, and what flows in meanwhile), so "600 per minute"
would not mean what it says. A window that slides does: it is cut into slots, a slot counts until it has wholly left the
window, so what is promised holds for every span, at the price that budget comes back up to one slot late.
"""

from __future__ import annotations

import math

SLOTS = 60
_MOST_AT_ONCE = (
    1 << 44
)  # of `taken`, which may be 64 bits somewhere: an engine may tell any number of tokens, and a client ask for any


class Window:
    """At most `limit` units in any `seconds`; every operation costs the same, however many units there are.

    `limit` may be changed at any time; a limit below what is used only means that nothing more is taken for a while.
    All that is ever taken is added to `taken[place]`, so that somebody may keep it elsewhere.
    """

    __slots__ = ("_counts", "_head", "_size", "_slot_seconds", "limit", "place", "seconds", "taken", "used")

    def __init__(self, limit: int, seconds: float, slots: int = SLOTS) -> None:
        self.limit = limit
        self.seconds = seconds
        self.used = 0
        self.taken: list[int] | memoryview[int] = [0]
        self.place = 0
        self._slot_seconds = seconds / slots
        # One more than fit into the window: the oldest counts until its last moment has left.
        self._size = slots + 1
        self._counts = [0] * self._size
        self._head = -1

    def advance(self, now: float) -> int:
        """Let what is older than the window go; the slot that `now` is in. `used` is true after this."""
        slot = int(now / self._slot_seconds)
        head = self._head
        if slot > head:
            counts, size = self._counts, self._size
            if head < 0 or slot - head >= size:
                self._counts = [0] * size
                self.used = 0
            else:
                for old in range(head + 1, slot + 1):
                    at = old % size
                    self.used -= counts[at]
                    counts[at] = 0
            self._head = slot
            return slot
        return head

    def take(self, amount: int, now: float) -> int:
        """Count `amount`, whether there is room or not; ask `used` first. The slot, for `give`."""
        slot = self.advance(now)
        self.count(amount, slot)
        return slot

    def count(self, amount: int, slot: int) -> None:
        """Count `amount` in the slot that `advance` has just given."""
        self._counts[slot % self._size] += amount
        self.used += amount
        self.taken[self.place] += amount if amount < _MOST_AT_ONCE else _MOST_AT_ONCE

    def give(self, amount: int, slot: int, now: float) -> None:
        """Take back `amount` of what was counted in `slot`; negative: it was more than that. Nothing, if that is no longer counted."""
        if self.advance(now) - slot < self._size:
            self._counts[slot % self._size] -= amount
            self.used -= amount
            if amount < 0:
                self.taken[self.place] += min(-amount, _MOST_AT_ONCE)

    def wait_seconds(self, amount: int, now: float) -> float:
        """How long until `amount` fits, if nothing else is taken; infinite if it never will."""
        slot = self.advance(now)
        excess = self.used + amount - self.limit
        if excess <= 0:
            return 0.0
        if amount > self.limit:
            return math.inf
        for old in range(slot - self._size + 1, slot + 1):
            excess -= self._counts[old % self._size]
            if excess <= 0:
                return (old + self._size) * self._slot_seconds - now
        return self.seconds + self._slot_seconds

    def reset_seconds(self, now: float) -> float:
        """How long until nothing is used any more."""
        slot = self.advance(now)
        for old in range(slot, slot - self._size, -1):
            if self._counts[old % self._size]:
                return (old + self._size) * self._slot_seconds - now
        return 0.0

    def ages(self, now: float) -> list[tuple[float, int]]:
        """What is used, as pairs (seconds for which it still counts, units), the oldest first."""
        slot = self.advance(now)
        return [
            ((old + self._size) * self._slot_seconds - now, count)
            for old in range(slot - self._size + 1, slot + 1)
            if (count := self._counts[old % self._size])
        ]

    def restore(self, remaining: list[tuple[float, int]], now: float) -> None:
        """Count what was used before, as `ages` told it; rounded so that it counts rather longer than shorter."""
        for seconds, amount in remaining:
            slot = math.ceil((now + min(seconds, self.seconds)) / self._slot_seconds) - self._size
            newest = self.advance(now)
            if newest - self._size < (slot := min(slot, newest)):
                self._counts[slot % self._size] += amount
                self.used += amount


class Level:
    """At most `limit` units at the same time: what is taken stays until it is given back."""

    __slots__ = ("limit", "used")

    seconds = 0.0

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def advance(self, now: float) -> int:
        """Nothing leaves by itself."""
        return 0

    def take(self, amount: int, now: float) -> int:
        """Count `amount`."""
        self.used += amount
        return 0

    def count(self, amount: int, slot: int) -> None:
        """Count `amount`; there is only one slot."""
        self.used += amount

    def give(self, amount: int, slot: int, now: float) -> None:
        """Take `amount` back."""
        self.used -= amount

    def wait_seconds(self, amount: int, now: float) -> float:
        """Unknown: when one of the requests ends. A second is a good time to ask again."""
        return 0.0 if self.used + amount <= self.limit else 1.0

    def reset_seconds(self, now: float) -> float:
        """Unknown in the same way."""
        return 1.0 if self.used else 0.0

    def ages(self, now: float) -> list[tuple[float, int]]:
        """All of it, for no time beyond its end."""
        return [(0.0, self.used)] if self.used else []
