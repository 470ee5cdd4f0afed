"""What a process took of limits is known to the next one, however it ended: neither lost to its tenants nor given twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.admission import Admission, AdmissionPolicy, Loads
from gateway.admission.limits import Need
from gateway.admission.schema import TenantLimits
from gateway.admission.sharing import LimitShares, Sharing
from gateway.admission.sharing.local_store import LocalStore
from gateway.admission.sharing.taken import MOST_LIMITS, OLD_SECONDS, TOUCH_SECONDS, LeftBooks, TakenBook, taken_folder
from gateway.admission.windows import Window
from gateway.errors import RateLimited
from gateway.routes import Routes
from gateway.testing import FakeClock

DAY, MINUTE = 100_000, 600


def book(folder: Path, name: str) -> TakenBook:
    return TakenBook(folder, name, lambda: 0.0)


def test_what_was_taken_since_the_store_was_told_is_known_after_a_death(tmp_path: Path) -> None:
    mine, windows = book(tmp_path, "a"), [Window(100, 60.0), Window(100, 60.0)]
    windows[0].take(3, 0.0)  # before anybody watches
    for name, window in zip("xy", windows, strict=True):
        mine.watch(name, window)
        mine.watch(name, window)
    slot = windows[0].take(5, 0.0)
    marks = mine.marks()
    windows[0].take(2, 0.0)
    mine.told(marks, ["x", "another"])
    windows[0].give(-4, slot, 0.0)  # an answer that was longer than expected
    windows[0].give(1, slot, 0.0)
    windows[1].take(7, 0.0)
    others = LeftBooks(tmp_path)
    assert not others.ended("a"), "it lives"
    assert others.untold("a", "x") is None
    mine.close(remove=False)
    windows[0].take(9, 0.0)  # noted nowhere any more
    assert others.ended("a")
    assert (others.untold("a", "x"), others.untold("a", "y"), others.untold("a", "z")) == (6, 7, None)
    assert not others.ended("nobody")


def test_an_engine_that_tells_any_number_of_tokens_breaks_nothing(tmp_path: Path) -> None:
    mine, window = book(tmp_path, "a"), Window(100, 60.0)
    mine.watch("x", window)
    slot = window.take(5, 0.0)
    for _ in range(2):
        window.give(5 - 10**20, slot, 0.0)
    window.take(1, 0.0)
    assert window.used == 2 * 10**20 - 4
    mine.close(remove=False)
    left = LeftBooks(tmp_path).untold("a", "x")
    assert left is not None
    assert left > 10**12


def test_who_has_told_everything_leaves_nothing(tmp_path: Path) -> None:
    mine = book(tmp_path, "a")
    mine.watch("x", Window(1, 60.0))
    mine.close(remove=True)
    assert not LeftBooks(tmp_path).ended("a")
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_for_the_file_nothing_is_noted_and_nothing_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("in the way")
    mine, window = book(tmp_path / "taken", "a"), Window(10, 60.0)
    for _ in range(2):
        mine.watch("x", window)
    window.take(1, 0.0)
    mine.told(mine.marks(), ["x"])
    mine.close(remove=True)
    assert len([r for r in caplog.records if "cannot be noted" in r.getMessage()]) == 1


def test_limits_beyond_the_files_length_are_unknown(tmp_path: Path) -> None:
    mine, last = book(tmp_path, "a"), Window(1, 60.0)
    for number in range(MOST_LIMITS):
        mine.watch(f"{number}", Window(1, 60.0))
    mine.watch("one more", last)
    last.take(1, 0.0)
    mine.close(remove=False)
    left = LeftBooks(tmp_path)
    assert (left.untold("a", "0"), left.untold("a", "one more")) == (0, None)


def test_a_file_that_is_cut_off_is_no_witness(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"short")
    assert not LeftBooks(tmp_path).ended("a")


def test_what_no_window_counts_any_more_is_swept(tmp_path: Path) -> None:
    old = book(tmp_path, "old")
    old.watch("x", Window(1, 60.0))
    old.close(remove=False)
    written = (tmp_path / "old").stat().st_mtime
    for days, left in ((0.9, {"old", "a"}), (1.1, {"a", "b"})):
        later = written + days * OLD_SECONDS
        name = "a" if days < 1 else "b"
        fresh = TakenBook(tmp_path, name, lambda later=later: later)  # type: ignore[misc]
        fresh.watch("x", Window(1, 60.0))
        assert {path.name for path in tmp_path.iterdir()} == left | {name}
        if name == "b":
            fresh.close(remove=True)
        else:
            kept = fresh
    kept.close(remove=True)


def test_of_a_process_that_ends_again_and_again_the_last_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.admission.sharing.taken.MOST_LEFT", 2)
    for number in range(4):
        one = book(tmp_path, f"{number}")
        one.watch("x", Window(1, 60.0))
        one.close(remove=False)
        os.utime(tmp_path / f"{number}", (1000.0 + number, 1000.0 + number))
    alive = book(tmp_path, "alive")
    alive.watch("x", Window(1, 60.0))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "alive"}
    alive.close(remove=True)


def test_a_folder_that_others_can_write_to_is_no_witness_and_not_written_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "open"
    mine = book(folder, "a")
    mine.watch("x", Window(1, 60.0))
    mine.close(remove=False)
    folder.chmod(0o777)
    assert not LeftBooks(folder).ended("a")
    other = book(folder, "b")
    other.watch("x", Window(1, 60.0))
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert "cannot be noted" in caplog.text


def test_it_is_kept_in_memory_where_there_is_some(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    assert taken_folder(disk, tmp_path) == tmp_path / f"sliceway-{os.getuid()}"
    assert taken_folder(disk, tmp_path / "none") == disk


def test_a_limit_beyond_64_bits_lets_any_number_be_asked_for(tmp_path: Path) -> None:
    mine, window = book(tmp_path, "a"), Window(2**200, 60.0)
    mine.watch("x", window)
    for _ in range(3):
        window.take(2**80, 0.0)
    assert window.used == 3 * 2**80
    mine.close(remove=False)
    assert (LeftBooks(tmp_path).untold("a", "x") or 0) > 2**44


def test_the_file_of_one_that_lives_long_is_dated_again(tmp_path: Path) -> None:
    """Also where the file system does not date what is written to memory."""
    clock = FakeClock()
    mine = TakenBook(tmp_path, "a", clock)
    mine.watch("x", Window(1, 60.0))
    clock.turn(2 * TOUCH_SECONDS)
    mine.told(mine.marks(), ["x"])
    for seconds, again in ((TOUCH_SECONDS / 2, False), (TOUCH_SECONDS, True)):
        os.utime(tmp_path / "a", (1.0, 1.0))
        clock.turn(seconds)
        mine.told(mine.marks(), ["x"])
        assert ((tmp_path / "a").stat().st_mtime > 1.0) is again
    mine.close(remove=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from gateway.admission.sharing.taken import TakenBook
from gateway.admission.windows import Window
book, window = TakenBook(Path(sys.argv[1]), "a", lambda: 0.0), Window(10**6, 60.0)
book.watch("x", window)
for _ in range(1234):
    window.take(1, 0.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_has_noted_all_of_it(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert ended.returncode == -9
    assert LeftBooks(tmp_path).untold("a", "x") == 1234


# ---- with the store


class Machine:
    """Gateways one after another, on one state directory and a clock that is turned by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = FakeClock()
        self.running: list[tuple[Sharing, TakenBook, LocalStore]] = []

    async def gateway(self, name: str) -> Admission:
        limits = TenantLimits(requests_per_minute=MINUTE, tokens_per_day=DAY)
        admission = Admission(lambda: Routes(), Loads(bound=1), self.clock, AdmissionPolicy(limits={"t": limits}))
        folder = self.root / "taken"
        store = LocalStore(self.root / "limits.sqlite3", self.clock, LeftBooks(folder))
        noted = TakenBook(folder, name, self.clock)
        sharing = Sharing(LimitShares(admission), store, self.clock, process=name, lease_seconds=5.0, book=noted)
        self.running.append((sharing, noted, store))
        await sharing.sync()
        return admission

    async def kill(self) -> None:
        """The last one, without a word: the kernel closes what it had open."""
        _, noted, store = self.running.pop()
        noted.close(remove=False)
        await store.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    assert not made.running


def admitted(admission: Admission, tokens: int, clock: FakeClock) -> int:
    """How many requests of so many tokens there is room for."""
    count = 0
    while True:
        try:
            admission.limits.reserve(admission.limits.of("t", "m"), Need(tokens, tokens), clock())
        except RateLimited:
            return count
        count += 1


async def test_after_a_gateway_was_killed_the_next_one_goes_on_where_it_was(machine: Machine) -> None:
    first = await machine.gateway("first")
    gauges = first.limits.of("t", "m")
    for _ in range(20):
        first.limits.reserve(gauges, Need(1000, 1000), machine.clock())
    await machine.running[-1][0].sync()
    for _ in range(10):  # nobody is told of these
        first.limits.reserve(gauges, Need(1000, 1000), machine.clock())
    await machine.kill()
    second = await machine.gateway("second")
    assert admitted(second, 1000, machine.clock) == 70, "all of the day that is left, at once, and no more"
    await machine.running.pop()[0].leave()


async def test_killed_again_and_again_a_tenant_gets_all_of_its_limit_and_no_more(machine: Machine) -> None:
    total = 0
    for number in range(30):
        admission = await machine.gateway(f"g{number}")
        for _ in range(4):
            try:
                admission.limits.reserve(admission.limits.of("t", "m"), Need(1000, 1000), machine.clock())
            except RateLimited:
                continue
            total += 1
        if number % 3 == 0:
            await machine.running[-1][0].sync()
        await machine.kill()
    assert total == DAY // 1000


async def test_one_that_only_says_nothing_keeps_its_share_for_its_lease(machine: Machine) -> None:
    silent = await machine.gateway("silent")
    other = await machine.gateway("other")
    assert admitted(other, 1000, machine.clock) == 0
    machine.clock.turn(6.0)
    await machine.running[-1][0].sync()
    assert admitted(other, 1000, machine.clock) == 0, "it may have used all of it unseen"
    assert admitted(silent, 1000, machine.clock) > 0
    for _ in range(2):
        await machine.kill()
