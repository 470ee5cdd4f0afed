"""The parts of batches without a gateway: lines, results, the gate, and a job against a caller of a few lines."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batches.capacity import Gate, IdleCapacity, Standing
from gateway.batches.inprocess import Reply
from gateway.batches.job import Job, Tools
from gateway.batches.lines import MAX_ERRORS, read, scan
from gateway.batches.record import Batch, Counts, window_seconds
from gateway.batches.results import Answer, Results
from gateway.batches.schema import BatchesConfig
from gateway.batches.store import BatchStore
from gateway.errors import MalformedRequest, StorageFull, UnknownObject
from gateway.files.database import Database
from gateway.files.store import ORPHAN_SECONDS, FileRecord, FileStore
from gateway.surface import Route
from gateway.tenants import Tenant
from gateway.testing import FakeClock

URL = "/v1/chat/completions"


def row(custom_id: str) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m"}}).encode() + b"\n"


# ---- lines


@given(st.lists(st.sampled_from([b"\n", b"  \r\n", b"x"]), max_size=8), st.booleans())
def test_every_request_is_found_where_it_lies(
    tmp_path_factory: pytest.TempPathFactory, between: list[bytes], newline: bool
) -> None:
    path = tmp_path_factory.mktemp("in") / "in.jsonl"
    wanted = [f"é{i}" for i, part in enumerate(between) if part == b"x"]
    whole = b"".join(row(f"é{i}") if part == b"x" else part for i, part in enumerate(between))
    path.write_bytes(whole if newline else whole.rstrip(b"\n"))
    found = scan(path, url=URL, max_requests=100, max_line_bytes=1000)
    assert [place.custom_id for place in found.places] == wanted
    assert [read(path, place).custom_id for place in found.places] == wanted
    assert [e.code for e in found.errors] == ([] if wanted else ["empty_file"])


@given(st.binary(max_size=400))
def test_any_bytes_are_lines_or_errors(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("in") / "in.jsonl"
    path.write_bytes(raw)
    found = scan(path, url=URL, max_requests=100, max_line_bytes=100)
    assert found.places or found.errors


def test_limits_of_lines_and_requests(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(row("a") + b'{"x": "' + b"y" * 5000 + b'"}\n' + row("b") + row("c"))
    found = scan(path, url=URL, max_requests=2, max_line_bytes=1000)
    assert [(e.line, e.code) for e in found.errors] == [(2, "line_too_long"), (4, "too_many_requests")]
    path.write_bytes(b"wrong\n" * 1000)
    assert len(scan(path, url=URL, max_requests=9999, max_line_bytes=1000).errors) == MAX_ERRORS


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86_400), ("90m", 5400), ("7d", 604_800)])
def test_windows(window: str, seconds: int) -> None:
    assert window_seconds(window) == seconds


@pytest.mark.parametrize("window", ["", "24", "0h", "8d", "-1h", "1h ", "99999h"])
def test_other_windows_are_refused(window: str) -> None:
    with pytest.raises(MalformedRequest):
        window_seconds(window)


# ---- results


def answer(custom_id: str, status: int = 200, body: bytes = b'{"a":1}') -> Answer:
    return Answer(custom_id, "req_1", status, body)


@given(st.integers(0, 400))
def test_half_a_line_is_cut_off_and_whole_ones_count(tmp_path_factory: pytest.TempPathFactory, lost: int) -> None:
    results = Results(tmp_path_factory.mktemp("batch"))
    results.append([answer("a"), answer("b"), answer("c", 400)])
    whole = results.output.read_bytes()
    results.output.write_bytes(whole[: max(0, len(whole) - lost)])
    answered, failed = results.resume()
    lines = results.output.read_bytes().splitlines(keepends=True)
    assert answered == {json.loads(line)["custom_id"] for line in lines} <= {"a", "b"}
    assert all(line.endswith(b"\n") for line in lines)
    assert failed == {"c"}
    results.append([answer("d")])
    assert results.resume()[0] == answered | {"d"}


def test_bodies_stand_on_one_line_whatever_they_are(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append([answer("a", body=b'{\n "x":\t1.0}'), answer("b", body=b"not json \xff"), answer("c", body=b"")])
    got = [json.loads(line)["response"]["body"] for line in results.output.read_bytes().splitlines()]
    assert got == [{"x": 1.0}, "not json �", ""]


# ---- room


def room(*replicas: tuple[int, int], own: int = 0, waiting: int = 0) -> int:
    return IdleCapacity(lambda *_: Standing(waiting, replicas), reserve_ratio=0.25).room("m", "acme", own)


def test_batches_get_what_is_idle() -> None:
    assert room((16, 0)) == 12
    assert room((16, 5)) == 7
    assert room((16, 14), (16, 0)) == 12, "what is too much on one replica is not taken from the next"
    assert room((16, 5), own=9) == 3, "requests on their way to an engine count, too"
    assert room((1, 0)) == 1, "an engine of one sequence serves batches, too"
    assert room((16, 0), waiting=1) == 0
    assert room() == 0
    assert IdleCapacity(lambda *_: None, reserve_ratio=0.25).room("unknown", "acme", 0) == 1


def test_the_gate_counts_to_its_bound_and_back() -> None:
    gate = Gate(lambda model, tenant, own: 3 - own, max_concurrent=4)
    assert [gate.try_enter("m", "acme") for _ in range(4)] == [True, True, True, False]
    assert [gate.try_enter("n", "acme"), gate.try_enter("n", "acme")] == [True, False]
    for model in ("m", "m", "m", "n"):
        gate.leave(model)
    assert gate.running == 0


# ---- jobs


class Script:
    """A caller that answers as the test says, by custom id; the body's `n` is the id."""

    def __init__(self, replies: Callable[[str, int], Reply]) -> None:
        self.replies = replies
        self.asked: Counter[str] = Counter()

    async def post(self, route: Route, tenant: Tenant, request_id: str, body: bytes) -> Reply:
        name = json.loads(body)["n"]
        self.asked[name] += 1
        await asyncio.sleep(0)
        return self.replies(name, self.asked[name])


class World:
    def __init__(self, root: Path, replies: Callable[[str, int], Reply]) -> None:
        self.clock = FakeClock(1_000_000.0)
        self.database = Database(root / "objects.db")
        self.files = FileStore(root / "files", self.database, self.clock, max_bytes_per_tenant=10_000)
        self.batches = BatchStore(self.database)
        self.caller = Script(replies)
        self.draining = False
        self.tenants: dict[str, Tenant] = {"acme": Tenant("acme")}
        self.gate = Gate(lambda _, __, own: 4 - own, max_concurrent=4)
        self.tools = Tools(
            files=self.files,
            batches=self.batches,
            caller=self.caller,
            gate=self.gate,
            tenant=self.tenants.get,
            config=BatchesConfig(max_concurrent=4),
            max_line_bytes=1000,
            work=root / "batches",
            wall=self.clock,
            draining=lambda: self.draining,
            pause=self._pause,
        )

    async def _pause(self, seconds: float) -> None:
        self.clock.turn(seconds)
        await asyncio.sleep(0)

    async def upload(self, count: int) -> FileRecord:
        rows = [
            {"custom_id": f"n{i}", "method": "POST", "url": URL, "body": {"model": "m", "n": f"n{i}"}}
            for i in range(count)
        ]
        with self.files.writing() as (path, file):
            file.write("".join(json.dumps(r) + "\n" for r in rows).encode())
            file.flush()
            return await self.files.keep(path, tenant="acme", filename="in", purpose="batch", lifetime_seconds=None)

    async def batch(self, count: int, *, window: int = 3600) -> Batch:
        source = await self.upload(count)
        made = Batch(
            id="batch_1",
            tenant="acme",
            endpoint=URL,
            input_file_id=source.id,
            completion_window="1h",
            created_at=int(self.clock()),
            expires_at=int(self.clock()) + window,
        )
        await self.batches.add(made)
        return made

    async def now(self) -> Batch:
        return await self.batches.get("batch_1", "acme")

    def rows(self, file_id: str | None) -> dict[str, Any]:
        if file_id is None:
            return {}
        return {
            r["custom_id"]: r
            for r in map(json.loads, self.files.path(file_id).read_text(encoding="utf-8").splitlines())
        }


def fine(_: str, __: int) -> Reply:
    return Reply(200, b"{}")


async def test_engines_that_fail_are_asked_again_and_load_is_waited_for(tmp_path: Path) -> None:
    def replies(name: str, time: int) -> Reply:
        if name == "n0":
            return Reply(502, b"{}")  # for ever
        if name == "n1":
            return Reply(503, b"{}", 2.0) if time < 30 else Reply(200, b"{}")
        return Reply(500, b"{}") if time == 1 else Reply(200, b"{}")

    world = World(tmp_path, replies)
    await Job(await world.batch(3), world.tools).run()
    done = await world.now()
    assert (done.status, done.counts) == ("completed", Counts(3, 2, 1))
    assert dict(world.caller.asked) == {"n0": 3, "n1": 30, "n2": 2}
    assert world.rows(done.error_file_id)["n0"]["response"]["status_code"] == 502
    assert world.gate.running == 0
    await world.database.close()


async def test_what_is_not_answered_in_time_has_expired(tmp_path: Path) -> None:
    world = World(tmp_path, lambda name, _: Reply(200, b"{}") if name < "n2" else Reply(503, b"{}"))
    await Job(await world.batch(4, window=60), world.tools).run()
    done = await world.now()
    assert (done.status, done.counts) == ("expired", Counts(4, 2, 2))
    assert set(world.rows(done.output_file_id)) == {"n0", "n1"}
    assert {r["error"]["code"] for r in world.rows(done.error_file_id).values()} == {"batch_expired"}
    assert done.expired_at == int(world.clock())
    await world.database.close()


async def test_a_tenant_that_is_gone_is_not_served(tmp_path: Path) -> None:
    world = World(tmp_path, fine)
    made = await world.batch(2)
    world.tenants.clear()
    await Job(made, world.tools).run()
    done = await world.now()
    assert (done.status, done.errors[0].code) == ("failed", "tenant_unknown")
    assert not world.caller.asked
    await world.database.close()


async def test_a_batch_whose_input_is_gone_fails(tmp_path: Path) -> None:
    world = World(tmp_path, fine)
    made = await world.batch(2)
    await world.files.delete(made.input_file_id, "acme")
    await Job(made, world.tools).run()
    assert (await world.now()).errors[0].code == "input_file_not_found"
    await world.database.close()


@pytest.mark.parametrize("answers_before", [0, 1, 5, 9])
async def test_jobs_that_are_killed_anywhere_lose_nothing(tmp_path: Path, answers_before: int) -> None:
    """The first job dies after so many answers; the second asks exactly for what is not written down."""
    reached = asyncio.Event()
    world = World(tmp_path, fine)

    def replies(name: str, _: int) -> Reply:
        if world.caller.asked.total() > answers_before:
            reached.set()
        return Reply(200, b"{}")

    world.caller.replies = replies
    task = asyncio.create_task(Job(await world.batch(10), world.tools).run())
    await reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    results = Results(tmp_path / "batches" / "batch_1")
    written = results.resume()[0]
    before = Counter(world.caller.asked)
    await Job(await world.now(), world.tools).run()
    done = await world.now()
    assert done.status == "completed"
    assert set(world.rows(done.output_file_id)) == {f"n{i}" for i in range(10)}
    again = world.caller.asked - before
    assert set(again) == {f"n{i}" for i in range(10)} - written
    assert set(again.values()) <= {1}
    assert world.gate.running == 0
    await world.database.close()


@pytest.mark.parametrize("files_moved", [0, 1, 2])
async def test_an_end_that_is_interrupted_is_taken_up_again(tmp_path: Path, files_moved: int) -> None:
    """Between the naming of the files and the last word any number of them may have been moved."""
    world = World(tmp_path, lambda name, _: Reply(200 if name == "n0" else 400, b"{}"))
    made = await world.batch(2)
    adopt, moved = world.files.adopt, 0

    async def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal moved
        if moved == files_moved:
            raise ConnectionError
        await adopt(*args, **kwargs)
        moved += 1
        if moved == files_moved == 2:
            raise ConnectionError

    object.__setattr__(world.files, "adopt", interrupted)
    with pytest.raises(ConnectionError):
        await Job(made, world.tools).run()
    named = await world.now()
    assert named.status == "finalizing"
    assert named.as_public()["output_file_id"] is None
    object.__setattr__(world.files, "adopt", adopt)
    await Job(named, world.tools).run()
    done = await world.now()
    assert (done.status, done.output_file_id) == ("completed", named.output_file_id)
    assert (await world.files.get(done.output_file_id or "", "acme")).purpose == "batch_output"
    assert world.caller.asked == {"n0": 1, "n1": 1}
    assert not (tmp_path / "batches" / "batch_1").exists()
    await world.database.close()


# ---- files


async def test_files_expire_and_orphans_are_swept(tmp_path: Path) -> None:
    world = World(tmp_path, fine)
    with world.files.writing() as (path, file):
        file.write(b"x")
        file.flush()
        short = await world.files.keep(path, tenant="acme", filename="a", purpose="batch", lifetime_seconds=5000)
    kept = await world.upload(1)
    orphan = tmp_path / "files" / "file-orphan"
    orphan.write_bytes(b"x")
    world.clock.now = max(orphan.stat().st_mtime + ORPHAN_SECONDS + 1, world.clock.now + 5001)
    with pytest.raises(UnknownObject):
        await world.files.get(short.id, "acme")
    await world.files.sweep()
    assert [p.name for p in (tmp_path / "files").iterdir()] == [kept.id]
    await world.database.close()


async def test_what_a_tenant_keeps_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, fine)
    with world.files.writing() as (path, file):
        file.write(b"x" * 10_001)
        file.flush()
        with pytest.raises(StorageFull, match="10001 bytes"):
            await world.files.keep(path, tenant="acme", filename="a", purpose="batch", lifetime_seconds=None)
    assert not list((tmp_path / "files").iterdir())
    await world.database.close()


async def test_pages_are_in_order_and_whole(tmp_path: Path) -> None:
    world = World(tmp_path, fine)
    made = []
    for _ in range(5):
        made.append((await world.upload(1)).id)
        world.clock.turn(1)
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = await world.files.page("acme", purpose="batch", limit=2, after=after, ascending=True)
        seen += [record.id for record in page]
        after = seen[-1]
    assert seen == made
    assert await world.files.page("beta", purpose=None, limit=9, after=None, ascending=False) == ([], False)
    await world.database.close()
