"""What a cluster's leader plans: for one reason at a time, beside its rounds, and what the head tells of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.cluster_leader import LeaderPlanning, Seen, Work
from gateway.config import Config
from model_registry.errors import SlicewayError
from placement.cluster.errors import ClusterUnreachable
from placement.cluster.survey import Survey
from placement.cluster.transitions import Why
from placement.repartitioning import Repartitioned
from placement.status import LeaderStatus, RepartitionStatus
from placement.transition.steps import Transition

CONFIG = Config(version="v1")
SEEN = Seen(CONFIG, {})
DONE = Repartitioned("done", "more is served")


@dataclass
class FakeHead:
    """It takes everything, and notes what it is told."""

    told: list[LeaderStatus] = field(default_factory=list)

    def survey(self) -> Survey:
        return Survey()

    def carry_out(self, survey: Survey, transition: Transition, why: Why) -> None:
        raise AssertionError("nothing is planned here")

    def transition(self) -> Mapping[str, Any] | None:
        return None

    def tell(self, told: LeaderStatus) -> None:
        self.told.append(told)


@dataclass
class FakeReason:
    """One whose attempts end when the test says so."""

    name: str
    due: bool = False
    found: Repartitioned | Exception = DONE
    go: threading.Event = field(default_factory=threading.Event)
    looks: int = 0
    begun: int = 0
    given_up: bool = False
    ends: list[Repartitioned] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def look(self, seen: Seen) -> bool:
        self.looks += 1
        return self.due

    def begin(self, seen: Seen) -> None:
        self.begun += 1

    def attempt(self, work: Work) -> Repartitioned:
        work.say(f"{self.name}: a step")
        while not self.go.is_set() and not self.given_up:
            self.given_up = work.pause(0.001)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def show(self, step: str) -> None:
        self.steps.append(step)

    def end(self, seen: Seen, found: Repartitioned) -> None:
        self.ends.append(found)

    def told(self, seen: Seen, so_far: LeaderStatus) -> LeaderStatus:
        return so_far.model_copy(update={"repartition": RepartitionStatus(counts={"done": len(self.ends)})})


@dataclass
class Site:
    head: FakeHead = field(default_factory=FakeHead)
    first: FakeReason = field(default_factory=lambda: FakeReason("first"))
    second: FakeReason = field(default_factory=lambda: FakeReason("second"))

    def __post_init__(self) -> None:
        self.planning = LeaderPlanning(self.head, (self.first, self.second))

    def until_ended(self, reason: FakeReason, attempts: int) -> None:
        """Rounds until so many attempts are over."""
        deadline = time.monotonic() + 30
        while len(reason.ends) < attempts:
            assert time.monotonic() < deadline
            self.planning.look(SEEN)
            time.sleep(0.001)  # the thread that is waited for is to run


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.planning.stop()


def test_nothing_is_attempted_that_is_not_due(site: Site) -> None:
    for _ in range(3):
        site.planning.look(SEEN)
    assert (site.first.looks, site.first.begun, site.second.begun) == (3, 0, 0)


def test_one_reason_at_a_time_and_the_first_before_the_second(site: Site) -> None:
    site.first.due = site.second.due = True
    for _ in range(3):
        site.planning.look(SEEN)
    assert (site.first.begun, site.second.begun) == (1, 0)
    assert site.second.looks == 3, "time counts for it as well meanwhile"
    site.first.due = False
    site.first.go.set()
    site.until_ended(site.first, 1)
    assert (site.first.ends, site.first.steps) == ([DONE], ["first: a step"])
    assert site.second.begun == 1


@pytest.mark.parametrize("error", [SlicewayError("no node answers"), RuntimeError("a fault")])
def test_what_an_attempt_raises_is_a_failure_and_ends_nothing_else(site: Site, error: Exception) -> None:
    site.first.due, site.first.found = True, error
    site.first.go.set()
    site.until_ended(site.first, 2)
    assert {found.result for found in site.first.ends} == {"failed"}
    assert str(error) in site.first.ends[0].reason


def test_a_head_that_does_not_answer_is_no_failure_of_what_is_attempted(site: Site) -> None:
    site.first.due, site.first.found = True, ClusterUnreachable("the cluster's head does not answer: killed")
    site.first.go.set()
    site.until_ended(site.first, 2)
    assert {found.result for found in site.first.ends} == {"busy"}
    assert "killed" in site.first.ends[0].reason


def test_the_head_is_told_what_it_does_not_tell_already(site: Site) -> None:
    site.planning.look(SEEN)
    (told,) = site.head.told
    assert told.repartition.counts == {"done": 0}
    site.planning.look(Seen(CONFIG, {"leader": told.model_dump(mode="json")}))
    assert len(site.head.told) == 1
    waits = told.repartition.model_copy(update={"next_in_seconds": 3.0})
    later = told.model_copy(update={"repartition": waits})
    site.planning.look(Seen(CONFIG, {"leader": later.model_dump(mode="json")}))
    assert len(site.head.told) == 1, "that time passes is no news"
    site.planning.look(Seen(CONFIG, {"leader": {"repartition": {"counts": {"done": 7}}}}))
    site.planning.look(Seen(CONFIG, {"leader": {"repartition": "what another version says"}}))
    assert len(site.head.told) == 3


def test_an_attempt_is_given_up_where_the_leader_ends(site: Site) -> None:
    site.first.due = True
    site.planning.look(SEEN)
    site.planning.stop()
    assert site.first.given_up
    site.planning.look(SEEN)
    assert site.first.begun == 1, "and no other one begins"
