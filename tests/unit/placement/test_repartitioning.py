"""Cutting GPUs anew for demand: when it is tried, one attempt at a time, and what slices demand may have meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import load_config
from gateway.layouts import machine_of, one_at_a_time
from gateway.repartitioning import Before, repartitioner, surplus
from model_registry.geometry import Placement
from placement.autoscale.attempts import Attempts, Result
from placement.demand_slices import OpenToDemand, for_demand
from placement.errors import PartitionError
from placement.goals import PlacementConfig
from placement.policy import AutoscalePolicy
from placement.repartitioning import UNDER_WAY_FILE, Repartitioned, Repartitioning, Tries, Wish
from placement.slices import Inventory, Slice, SliceKind
from placement.state import StatePaths
from placement.testing import FakeClock
from placement.transition.journal import JOURNAL_FILE, Record, TransitionJournal
from placement.transition.steps import Place, Step, Transition

AUTOMATIC = AutoscalePolicy(repartition="automatic")
PROPOSE = AutoscalePolicy()
WISH = Wish({"a": 3}, {"a": 7.0}, {"a": 2})


# ---- when


def test_a_shortage_has_to_last() -> None:
    seen = Attempts().seen(True, 100.0).seen(True, 110.0)
    assert not seen.due(AUTOMATIC, 114.0)
    assert seen.due(AUTOMATIC, 115.0)
    assert not seen.seen(False, 114.5).seen(True, 114.6).due(AUTOMATIC, 115.0), "it was over for a moment"


@given(results=st.lists(st.sampled_from(["done", "unchanged", "busy", "failed"]), min_size=1, max_size=30))
def test_after_an_attempt_nothing_is_tried_at_once_and_failures_wait_longer(results: list[Result]) -> None:
    attempts, now, waits = Attempts(), 0.0, list[float]()
    for result in results:
        attempts = attempts.ended(AUTOMATIC, result, now)
        short = attempts.seen(True, now)
        assert not short.due(AUTOMATIC, now)
        waits.append(attempts.not_before - now)
        now = attempts.not_before
    assert all(0 < wait <= 3600 for wait in waits)
    for before, result, wait, last in zip(results, results[1:], waits[1:], waits, strict=False):
        if (before, result) == ("failed", "failed"):
            assert wait >= min(3600, 2 * last)
        if result in ("done", "unchanged"):
            assert wait == AUTOMATIC.cool_down


# ---- one at a time


class Site:
    """A `Repartitioning` whose attempts end when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.wishes: list[Wish] = []
        self.ends: list[asyncio.Future[Repartitioned]] = []
        self.changes = 0
        self.one = Repartitioning(StatePaths(folder), self._attempt, self.clock, self._changed)

    async def _attempt(self, wish: Wish, say: Callable[[str], None]) -> Repartitioned:
        self.wishes.append(wish)
        say("create somewhere")
        self.ends.append(asyncio.get_running_loop().create_future())
        return await self.ends[-1]

    def _changed(self) -> None:
        self.changes += 1

    async def looks(self, seconds: int, policy: AutoscalePolicy = AUTOMATIC, *, short: bool = True) -> None:
        for _ in range(seconds):
            await self.clock.sleep(1.0)
            self.one.look(policy, short, lambda: WISH)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self, found: Repartitioned | Exception) -> None:
        if isinstance(found, Exception):
            self.ends[-1].set_exception(found)
        else:
            self.ends[-1].set_result(found)
        for _ in range(5):
            await asyncio.sleep(0)


async def test_one_attempt_at_a_time_and_the_next_after_the_cool_down(tmp_path: Path) -> None:
    site = Site(tmp_path)
    await site.looks(15)
    assert site.wishes == []
    await site.looks(60)
    assert site.wishes == [WISH], "a second one does not begin beside it"
    told = site.one.status(AUTOMATIC)
    assert (told.running, told.step, told.mode) == (True, "create somewhere", "automatic")
    await site.end(Repartitioned("done", "more is served", ("create somewhere",)))
    told = site.one.status(AUTOMATIC)
    assert (told.running, told.counts, told.events[0].steps) == (False, {"done": 1}, ("create somewhere",))
    await site.looks(59)
    assert len(site.wishes) == 1
    await site.looks(20)
    assert len(site.wishes) == 2
    await site.one.stop()


async def test_a_failure_is_told_backs_off_and_takes_nothing_down(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number, error in enumerate([PartitionError("no room"), RuntimeError("a bug")], 1):
        await site.looks(16 if number == 1 else 136)
        assert len(site.wishes) == number
        await site.end(error)
    told = site.one.status(AUTOMATIC)
    assert told.counts == {"failed": 2}
    assert ["no room" in e.reason for e in told.events] == [True, False]
    assert told.next_in_seconds == pytest.approx(240)
    await site.looks(239)
    assert len(site.wishes) == 2


async def test_what_is_only_proposed_is_never_done(tmp_path: Path) -> None:
    site = Site(tmp_path)
    await site.looks(500, PROPOSE)
    assert site.wishes == []
    await site.looks(10)
    assert site.wishes == [], "the shortage counts from when the configuration allows it"


async def test_what_was_begun_before_a_kill_is_finished_whatever_the_configuration_says(tmp_path: Path) -> None:
    (tmp_path / UNDER_WAY_FILE).write_text("{}", encoding="utf-8")
    site = Site(tmp_path)
    await site.looks(1, PROPOSE, short=False)
    assert site.wishes == [Wish({}, {}, {})]
    await site.one.stop()
    assert not site.one.status(PROPOSE).running


def test_a_proposal_that_stands_is_one_event() -> None:
    clock = FakeClock()
    tries = Tries(clock)
    for reason in ("2.1 requests/s more", "2.2 requests/s more"):
        tries.begin(WISH)
        tries.end(PROPOSE, Repartitioned("proposed", reason))
    told = tries.status(PROPOSE)
    assert (told.proposed, told.counts) == ("2.2 requests/s more", {"proposed": 2})
    assert [event.reason for event in told.events] == ["2.2 requests/s more"]
    assert tries.look(PROPOSE, True, begun=False, proposes=True) is None, "not so soon"
    assert tries.status(PROPOSE).proposed is not None
    tries.look(PROPOSE, False, begun=False, proposes=True)
    assert tries.status(PROPOSE).proposed is None, "nobody is short any more"


def test_where_somebody_is_in_the_way_each_time_it_is_tried_less_often_up_to_the_cool_down() -> None:
    attempts, waits = Attempts(), list[float]()
    for _ in range(5):
        attempts = attempts.ended(AUTOMATIC, "busy", 100.0)
        waits.append(attempts.not_before - 100.0)
    assert waits == [10.0, 20.0, 40.0, 60.0, 60.0]
    after = attempts.ended(AUTOMATIC, "unchanged", 0.0).ended(AUTOMATIC, "busy", 0.0)
    assert after.not_before == 10.0, "and starts over"


# ---- what is given back


@given(
    before=st.lists(st.integers(0, 9), unique=True, max_size=5),
    now=st.lists(st.integers(0, 12), unique=True, max_size=8),
)
def test_every_pool_keeps_as_many_seats_as_it_had(before: list[int], now: list[int]) -> None:
    had = {f"a-{n}" for n in before}
    seated = {f"a-{n}": f"slice-{n}" for n in now} | {"a@acme-0": "other", "b-0": "third"}
    back = surplus(seated, had | {"b-0"}, {"a", "b"})
    assert len(seated) - len(back) == min(len(before), len(now)) + 2
    assert all(name.startswith("a-") and seated[name] == slice_id for name, slice_id in back.items())
    kept = set(seated) - set(back)
    assert len(kept & had) == len(set(seated) & had), "the same ones, where they are still there"


def test_a_note_that_makes_no_sense_gives_nothing_back(tmp_path: Path) -> None:
    note = Before(tmp_path / UNDER_WAY_FILE)
    assert note.read() is None
    note.keep({"a-0"})
    assert note.read() == {"a-0"}
    note.path.write_text("[]", encoding="utf-8")
    assert note.read() is None
    assert not note.path.exists()


def test_while_a_transition_is_under_way_demand_gets_nothing_new_and_leaves_what_goes(tmp_path: Path) -> None:
    inventory = Inventory(tuple(Slice(f"GPU-1/1g.10gb@{n}", SliceKind.CPU, None, 2**30, cores=(n,)) for n in range(2)))
    paths, config = StatePaths(tmp_path), PlacementConfig()
    assert for_demand(config, inventory, paths).barred == frozenset()
    step = Step(0, "destroy", Place("GPU-1", Placement.parse("1g.10gb@0")))
    transition = Transition((step,), "f", "t", {}, {}, {}, ())
    TransitionJournal(tmp_path / JOURNAL_FILE).write(Record(transition, FakeClock().now()))
    open_to = for_demand(config, inventory, paths)
    assert (open_to.barred, open_to.closed) == (frozenset(inventory.by_id), {"GPU-1/1g.10gb@0"})
    raw = json.loads((tmp_path / JOURNAL_FILE).read_text(encoding="utf-8"))
    for changed in (
        raw | {"by": [raw["by"][0], raw["by"][1] + 1, raw["by"][2]]},  # whoever was at it has ended
        raw | {"by": None},
        raw | {"failed": {"step": 0, "error": {}}},
        {},
    ):
        (tmp_path / JOURNAL_FILE).write_text(json.dumps(changed), encoding="utf-8")
        assert for_demand(config, inventory, paths) == OpenToDemand(), "nobody is at it: demand is served"


async def test_an_operators_apply_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_LIBRARY_PATH", "SLICEWAY_NVML_STATE", "SLICEWAY_NVML_PRIVILEGE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # a simulated machine is entered; this puts it back
    monkeypatch.setattr("gateway.layouts.NvmlPartitioner", lambda: None)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {tmp_path / 'state'}\nfleet: {{discover: {{simulate: {{h100-sxm: 1}}}}}}\n",
        encoding="utf-8",
    )
    config = load_config(path)
    machine = machine_of(config)
    with one_at_a_time(config, machine):
        found = await repartitioner(lambda: config)(WISH, lambda _: None)
    assert found.result == "busy"
    assert "at work already" in found.reason
