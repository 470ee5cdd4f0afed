"""Cutting GPUs anew for demand, carried out: weighed by the planner, then the same lock, journal and steps as `sliceway apply`.

Seats are what a plan gives, and what demand brings has none, so that it can go again. For the time of the transition both
have one; afterwards the seats beyond those that were there before are given back, and their replicas go on where they are.
`repartition.json` holds what was there before, from the first step until that is done, also over a kill.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.applying import Works
from gateway.config import Config
from gateway.layouts import machine_of, one_at_a_time, running_controller, seats
from gateway.planning import for_demand, unseated
from model_registry.atomic import write_atomically
from model_registry.errors import SlicewayError
from placement.assign import natural, stem_of
from placement.errors import StateLocked
from placement.foreman import notify
from placement.partition import plan as plan_layouts
from placement.repartitioning import UNDER_WAY_FILE, Repartitioned, Repartitioner, Wish
from placement.state import StatePaths
from placement.transition import Outcome, Step


@dataclass(frozen=True, slots=True)
class Before:
    """Who had a seat before GPUs were cut anew for demand."""

    path: Path

    def keep(self, replicas: Collection[str]) -> None:
        """Write it down."""
        write_atomically(self.path, json.dumps({"seats": sorted(replicas)}).encode(), mode=0o600)

    def read(self) -> frozenset[str] | None:
        """None where nothing is under way. A file that makes no sense keeps every seat: nothing that runs is given up for it."""
        try:
            return frozenset(str(name) for name in json.loads(self.path.read_bytes())["seats"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.forget()
            return None

    def forget(self) -> None:
        """Nothing is under way."""
        self.path.unlink(missing_ok=True)


def repartitioner(load: Callable[[], Config]) -> Repartitioner:
    """What a controller cuts GPUs anew with; `load` reads the configuration."""

    async def attempt(wish: Wish, say: Callable[[str], None]) -> Repartitioned:
        config = load()
        machine = machine_of(config)
        try:
            with one_at_a_time(config, machine):
                return await _attempt(config, wish, say)
        except StateLocked as error:
            return Repartitioned("busy", error.message)

    return attempt


def surplus(seated: Mapping[str, str], before: Collection[str], pools: Collection[str]) -> dict[str, str]:
    """The seats that are given back, of those pools whose replicas follow demand: each keeps as many as it had `before`,
    and the same ones where they are still there. Pure.
    """
    had = Counter(map(stem_of, before))
    back: dict[str, str] = {}
    for pool in pools:
        mine = sorted((r for r in seated if stem_of(r) == pool), key=lambda r: (r not in before, natural(r)))
        back |= {replica: seated[replica] for replica in mine[had[pool] :]}
    return back


async def _attempt(config: Config, wish: Wish, say: Callable[[str], None]) -> Repartitioned:
    def watch(step: Step, what: Literal["begun", "done", "failed"]) -> None:
        if what == "begun":
            say(str(step))

    works = Works.of(config, machine_of(config), recut=True, watch=watch)
    before = Before(config.state / UNDER_WAY_FILE)
    if before.read() is None and works.journal.read() is not None:
        return Repartitioned(
            "busy", "a transition that somebody else began is not finished: sliceway apply CONFIG goes on with it"
        )
    resumed = await works.finished()
    if resumed is not None:
        return await _ended(works, before, wish, resumed)
    _give_back(config, before, wish)
    return await _weighed(works, before, wish)


async def _weighed(works: Works, before: Before, wish: Wish) -> Repartitioned:
    config = works.config
    if not wish.replicas:
        return Repartitioned("unchanged", "what was begun before is tidied up")
    plans = plan_layouts(await works.gpus(), config.fleet.layouts)
    extras = unseated(config)
    found = await asyncio.to_thread(for_demand, config, plans, wish, extras)
    proposal = found.proposal
    if proposal is None:
        return Repartitioned("unchanged", "free slices do, or no way of cutting GPUs would serve more")
    if not proposal.automatic:
        return Repartitioned("unchanged", f"not worth what it disturbs: {proposal.reason}")
    before.keep(seats(config).read() or {})
    for replica, slice_id in extras.items():
        seats(config).put(replica, slice_id)
    try:
        outcome = await works.executor.begin(proposal.transition)
    except SlicewayError:  # the fleet has changed since it was looked at; no step was taken
        _give_back(config, before, wish)
        raise
    return await _ended(works, before, wish, outcome, proposal.reason)


async def _ended(works: Works, before: Before, wish: Wish, outcome: Outcome, reason: str = "") -> Repartitioned:
    """Tidy up after the last step, whichever it was: what was begun and not done is taken back."""
    if not outcome.ok:
        await works.fleet.abandon(outcome.not_done)
        works.journal.clear()
    _give_back(works.config, before, wish)
    done = tuple(str(step) for step in outcome.done)
    if outcome.ok:
        return Repartitioned("done", reason or "what a controller before this one had begun is finished", done)
    left = f"{len(outcome.not_done)} of {len(outcome.done) + len(outcome.not_done)} steps are not done"
    return Repartitioned("failed", f"{outcome.failed}: {outcome.error}; {left}", done)


def _give_back(config: Config, before: Before, wish: Wish) -> None:
    """Seats beyond those of before are demand's again."""
    had, seated = before.read(), seats(config).read()
    if had is None or seated is None:
        return
    status = running_controller(config)
    pools = set(wish.replicas) | set(status.scaling if status else ())
    for replica, slice_id in surplus(seated, had, pools).items():
        seats(config).remove(replica, slice_id)
    before.forget()
    notify(StatePaths(config.state))
