"""Back-off, liveness, locks, paths, journal, memory, status: the small parts that the controller is made of."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import PlacementError, StateLocked
from placement.locks import exclusive, holder
from placement.replicas.backoff import Restarts, after_end
from placement.replicas.journal import ExitRecord, Journal, JournalEntry
from placement.replicas.liveness import Liveness
from placement.replicas.memory import measure
from placement.replicas.probe import Activity, parse_activity
from placement.replicas.procfs import ProcessIdentity, proportional_bytes, resident_bytes, sessions
from placement.schema import LivenessConfig, RestartConfig
from placement.state import StatePaths, file_name, socket_name

# ---- back-off

configs = st.builds(
    RestartConfig,
    first_delay_seconds=st.floats(0.01, 10),
    max_delay_seconds=st.floats(10, 100),
    max_fast_failures=st.integers(1, 100),
)


@given(configs, st.integers(0, 99), st.floats(0, 0.999))
def test_delays_are_between_half_and_all_of_their_nominal_value_and_bounded(
    config: RestartConfig, before: int, jitter: float
) -> None:
    decision = after_end(Restarts(5, before), config, was_ready=False, uptime_seconds=1e9, jitter=jitter)
    if before + 1 >= config.max_fast_failures:
        assert decision.delay_seconds is None
        assert decision.restarts.total == 5
    else:
        nominal = min(config.first_delay_seconds * 2**before, config.max_delay_seconds)
        assert decision.delay_seconds is not None
        assert nominal / 2 <= decision.delay_seconds <= nominal
        assert decision.restarts == Restarts(6, before + 1)


def test_a_ready_engine_that_ran_long_enough_starts_afresh() -> None:
    config = RestartConfig(fast_failure_seconds=60, max_fast_failures=2)
    assert after_end(Restarts(1, 1), config, was_ready=True, uptime_seconds=60, jitter=0).restarts == Restarts(2, 0)
    assert after_end(Restarts(1, 1), config, was_ready=True, uptime_seconds=59.9, jitter=0).delay_seconds is None


def test_jitter_is_a_share() -> None:
    with pytest.raises(ValueError, match="jitter"):
        after_end(Restarts(), RestartConfig(), was_ready=True, uptime_seconds=0, jitter=1.0)


# ---- liveness


def test_only_failures_in_a_row_count() -> None:
    alive = Liveness(LivenessConfig(failures=3), at=0)
    verdicts = [
        alive.observe(t, healthy=h, activity=None) for t, h in enumerate([False, False, True, False, False, False])
    ]
    assert verdicts == [None] * 5 + [2], "given up after three in a row, for as long as these lasted"


def test_a_stall_is_requests_without_steps() -> None:
    alive = Liveness(LivenessConfig(stall_seconds=10), at=0)

    def look(at: float, running: int, steps: float) -> float | None:
        return alive.observe(at, healthy=True, activity=Activity(running, 0, steps))

    assert look(0, 1, 5) is None
    assert look(9, 1, 5) is None
    assert look(9.5, 1, 6) is None, "a step ended"
    assert look(30, 0, 6) is None, "nothing runs"
    assert look(39, 1, 6) is None
    assert look(40, 1, 6) == 10


def test_a_hung_engine_on_a_gpu_is_found_within_ten_seconds() -> None:
    alive = Liveness(LivenessConfig(), at=0, on_gpu=True)
    hangs_since = 0.1  # its last step ended just before the first check
    at, found = 0.0, None
    while found is None:
        at += alive.interval_seconds
        found = alive.observe(at, healthy=True, activity=Activity(1, 0, 7))
    assert at - hangs_since <= 10
    patient = Liveness(LivenessConfig(), at=0)
    assert [patient.observe(at, healthy=True, activity=Activity(1, 0, 7)) for at in (5, 60, 120)] == [None] * 3


def test_a_stall_can_be_left_unwatched() -> None:
    alive = Liveness(LivenessConfig(stall_seconds=0), at=0)
    for at in (0, 1e6):
        assert alive.observe(at, healthy=True, activity=Activity(1, 0, 1)) is None


def test_activity_is_read_from_metrics_of_several_engines() -> None:
    page = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="m"} 1.0\n'
        'vllm:num_requests_waiting{engine="0"} 4.0\n'
        'vllm:iteration_tokens_total_count{engine="0"} 1e3\n'
        "process_cpu_seconds_total 9\n"
    )
    assert parse_activity(page) == Activity(3, 4, 1000.0)
    assert parse_activity("up 1\n") is None


# ---- locks


def test_a_lock_tells_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "lock"
    script = f"from pathlib import Path\nfrom placement.locks import exclusive\nwith exclusive(Path({str(path)!r}), what='x', remedy=''):\n    print('held', flush=True)\n    input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert holder(path) == other.pid
        with (
            pytest.raises(StateLocked, match=f"pid {other.pid}") as error,
            exclusive(path, what="controller", remedy="kill {pid}"),
        ):
            pass
        assert error.value.remedy == f"kill {other.pid}"
        other.kill()
        other.wait()
        assert holder(path) is None
        with exclusive(path, what="controller", remedy=""):
            assert holder(path) == os.getpid()
    assert holder(tmp_path / "none") is None


# ---- paths


@given(st.text(min_size=1, max_size=40))
def test_any_name_is_one_visible_component_of_a_path(name: str) -> None:
    made = file_name(name)
    assert "/" not in made
    assert not made.startswith(".")
    assert len(socket_name(name)) == len("0123456789ab.sock")


@given(st.text(max_size=12), st.text(max_size=12))
def test_different_names_are_different_files(one: str, other: str) -> None:
    assert (file_name(one) == file_name(other)) == (one == other)


def test_a_socket_path_always_fits_into_an_address(tmp_path: Path) -> None:
    short = StatePaths(Path("/s"))
    assert short.runtime({}) == Path("/s/run")
    deep = StatePaths(tmp_path / ("x" * 120))
    outside = deep.runtime({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert outside.parent == Path("/run/user/7")
    assert outside != StatePaths(tmp_path / ("y" * 120)).runtime({"XDG_RUNTIME_DIR": "/run/user/7"})


def test_the_socket_directory_is_ours_alone(tmp_path: Path) -> None:
    """It is in the state directory, or elsewhere where this test's own path is long."""
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    paths = StatePaths(tmp_path / "state")
    sockets = paths.runtime(environ)
    sockets.mkdir(parents=True, mode=0o755)
    paths.prepare(environ)
    assert sockets.stat().st_mode & 0o777 == 0o700
    elsewhere = StatePaths(tmp_path / "other")
    (tmp_path / "other").mkdir()
    elsewhere.runtime(environ).symlink_to(tmp_path)
    with pytest.raises(PlacementError, match="not a directory of yours"):
        elsewhere.prepare(environ)


def test_a_state_directory_that_cannot_be_made_says_which(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PlacementError, match="cannot be made") as error:
        StatePaths(tmp_path / "file" / "state").prepare({})
    assert "state_dir" in str(error.value.remedy)


# ---- journal


def entry(**more: object) -> JournalEntry:
    return JournalEntry.model_validate(
        {
            "replica": "a/b-0",
            "model": "a/b",
            "task": "generate",
            "slice_id": "cpu-0",
            "spec_hash": "0" * 16,
            "endpoint": "unix:/x",
            "log_offset": 0,
            "started_at": datetime(2026, 1, 1, tzinfo=UTC),
            "engine_pid": 7,
            **more,
        }
    )


def test_entries_are_found_again_and_damaged_ones_left_out(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    journal = Journal(paths)
    journal.write(entry())
    paths.replica("broken").mkdir()
    paths.journal("broken").write_text('{"replica": ', encoding="utf-8")
    assert journal.entries() == (entry(),)
    journal.forget("a/b-0")
    journal.forget("a/b-0")
    assert journal.entries() == ()


def test_an_exit_record_of_another_process_is_not_this_ones(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path)
    journal = Journal(paths)
    journal.write(entry())
    assert journal.exit_record(entry()) is None
    paths.exit_record("a/b-0").write_text(
        ExitRecord(engine_pid=7, code=3, signal=None).model_dump_json(), encoding="utf-8"
    )
    assert journal.exit_record(entry()) == ExitRecord(engine_pid=7, code=3, signal=None)
    assert journal.exit_record(entry(engine_pid=8)) is None


# ---- processes


def test_a_pid_alone_is_no_identity() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    assert me.alive
    assert not ProcessIdentity(me.pid, me.start_ticks + 1, me.boot_id).alive
    assert not ProcessIdentity(me.pid, me.start_ticks, "another boot").alive
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert ProcessIdentity.of(child.pid) is None


def test_a_process_whose_name_is_no_utf_8_is_known_all_the_same() -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes("café".encode("latin-1"))
    try:
        found = ProcessIdentity.of(os.getpid())
        assert found is not None
        assert found.alive
    finally:
        name.write_bytes(before)


def test_memory_of_a_session_is_exact_only_where_it_seems_too_much() -> None:
    script = "x = bytearray(64 * 2**20); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            assert sessions([child.pid])[child.pid] == [child.pid]
            assert 64 * 2**20 < proportional_bytes([child.pid]) <= resident_bytes([child.pid])
            assert not measure({child.pid: 2**40})[child.pid].exact
            over = measure({child.pid: 2**20})[child.pid]
            assert over.exact
            assert over.used_bytes > 64 * 2**20
        finally:
            child.kill()
    assert measure({}) == {}
