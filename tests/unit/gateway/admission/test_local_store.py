"""The leases that a store of one machine keeps: of who lives, and of who has died as long as what it left may count."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from gateway.admission.sharing.ledger import Report
from gateway.admission.sharing.local_store import LocalStore

DAY_SECONDS = 86400.0
LEASE_SECONDS = 5.0


class Turned:
    """Seconds since 1970, turned by hand."""

    def __init__(self) -> None:
        self.seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


def leases(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT process FROM leases")}


def asked(want: int, used: int = 0) -> Report:
    return Report("t\n\ntokens_per_day", 100, DAY_SECONDS, want, 0, ((DAY_SECONDS, used),) if used else ())


async def test_a_process_that_died_is_forgotten_when_nothing_that_it_left_counts_any_more(tmp_path: Path) -> None:
    clock = Turned()
    path = tmp_path / "limits.sqlite3"
    store = LocalStore(path, clock)
    await store.sync("dead", [asked(60, used=10)], LEASE_SECONDS, 1)
    clock.seconds += DAY_SECONDS
    grants, living = await store.sync("next", [asked(100)], LEASE_SECONDS, 1)
    assert (grants[asked(0).name].share, living) == (50, 1), "it may have taken all of its share before it died"
    assert leases(path) == {"dead", "next"}
    clock.seconds += 2 * LEASE_SECONDS + 1
    grants, _ = await store.sync("next", [asked(100)], LEASE_SECONDS, 1)
    assert grants[asked(0).name].share == 100
    assert leases(path) == {"next"}
    await store.close()


async def test_however_many_gateways_there_were_one_row_is_left_of_each_day(tmp_path: Path) -> None:
    clock = Turned()
    path = tmp_path / "limits.sqlite3"
    store = LocalStore(path, clock)
    for number in range(20):
        await store.sync(f"gateway-{number}", [], LEASE_SECONDS, 1)
        clock.seconds += DAY_SECONDS / 2
    assert len(leases(path)) <= 4
    await store.close()
