"""Real processes under the shim: pinned, waited for, ended, found again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from placement.errors import PlacementError
from placement.launch import LaunchSpec
from placement.replicas.journal import Journal
from placement.replicas.process import LOG_LIMIT_BYTES, EngineProcess, LocalLauncher, read_log, secure
from placement.schema import EngineConfig
from placement.slices import Slice, SliceKind
from placement.state import StatePaths

pytestmark = pytest.mark.integration

SCRIPT = str(Path(__file__).with_name("script_engine.py"))
CORE = min(os.sched_getaffinity(0))
CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(CORE,))
QUICK = EngineConfig(stop_timeout_seconds=0.5, drain_timeout_seconds=0)


@pytest.fixture
def launcher(tmp_path: Path) -> LocalLauncher:
    paths = StatePaths(tmp_path / "state")
    paths.prepare({})
    return LocalLauncher(paths, Journal(paths), {"PATH": os.environ["PATH"], "SECRET": "s"})


def spec(*flags: str, argv: tuple[str, ...] | None = None, target: Slice = CPU) -> LaunchSpec:
    return LaunchSpec(
        "chat-0", "chat", "generate", target, argv or (sys.executable, SCRIPT, "{uds}", *flags), {"MARK": "1"}
    )


def written(launcher: LocalLauncher, process: EngineProcess) -> str:
    return read_log(launcher.paths.log("chat-0"), process.entry.log_offset)


async def test_the_whole_tree_is_pinned_and_ends_together(
    launcher: LocalLauncher, eventually_async: Callable[..., Any]
) -> None:
    process = launcher.start(spec("--child"), QUICK)
    log = await eventually_async(
        lambda: (t := written(launcher, process)).count(f"[{CORE}]") == 2 and t, "both say their cores"
    )
    child = psutil.Process(int(log.split("child ")[1].split()[0]))
    engine = psutil.Process(process.entry.engine_pid)
    assert os.getsid(child.pid) == process.session == os.getsid(engine.pid)
    assert engine.environ()["MARK"] == "1"
    process.terminate()
    record = await process.wait()
    assert record is not None
    assert (record.signal, record.code, record.stop_requested) == (signal.SIGTERM, None, True)
    assert not child.is_running()
    assert process.ended


async def test_an_engine_that_ends_by_itself_leaves_its_code(launcher: LocalLauncher) -> None:
    process = launcher.start(spec("--die", "RuntimeError: no weights"), QUICK)
    record = await process.wait()
    assert record is not None
    assert (record.code, record.signal, record.stop_requested) == (3, None, False)
    assert "RuntimeError: no weights" in written(launcher, process)
    assert record.ended_at >= record.started_at


async def test_one_that_ignores_sigterm_is_killed_in_time(
    launcher: LocalLauncher, eventually_async: Callable[..., Any]
) -> None:
    process = launcher.start(spec("--stubborn"), QUICK)
    await eventually_async(lambda: f"[{CORE}]" in written(launcher, process), "it runs")
    process.terminate()
    record = await process.wait()
    assert record is not None
    assert record.signal == signal.SIGKILL


async def test_a_killed_shim_takes_its_engine_with_it(
    launcher: LocalLauncher, eventually_async: Callable[..., Any]
) -> None:
    process = launcher.start(spec("--child"), QUICK)
    log = await eventually_async(lambda: (t := written(launcher, process)).count(f"[{CORE}]") == 2 and t, "both run")
    child = psutil.Process(int(log.split("child ")[1].split()[0]))
    os.kill(process.session, signal.SIGKILL)
    assert await process.wait() is None, "nobody could write down how it ended"
    await eventually_async(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the engine's child has gone"
    )
    assert (
        not psutil.pid_exists(process.entry.engine_pid)
        or psutil.Process(process.entry.engine_pid).status() == psutil.STATUS_ZOMBIE
    )


async def test_a_killed_engine_is_told_from_one_that_stopped(launcher: LocalLauncher) -> None:
    process = launcher.start(spec(), QUICK)
    os.kill(process.entry.engine_pid, signal.SIGKILL)
    record = await process.wait()
    assert record is not None
    assert (record.signal, record.stop_requested) == (signal.SIGKILL, False)


@pytest.mark.parametrize(
    ("wrong", "message", "remedy"),
    [
        (
            spec(argv=("/no/such/engine", "{uds}")),
            "No such file or directory: /no/such/engine",
            "engine.python or engine.command",
        ),
        (spec(target=Slice("cpu-9", SliceKind.CPU, None, 1, cores=(1023,))), "Invalid argument", "sliceway slices"),
    ],
)
async def test_what_cannot_be_started_is_said_at_once(
    launcher: LocalLauncher, wrong: LaunchSpec, message: str, remedy: str
) -> None:
    with pytest.raises(PlacementError, match=message) as error:
        launcher.start(wrong, QUICK)
    assert remedy in str(error.value.remedy)
    assert launcher.journal.entries() == ()


async def test_it_is_found_again_by_pid_and_start_time_only(launcher: LocalLauncher) -> None:
    process = launcher.start(spec(), QUICK)
    entry = launcher.journal.of("chat-0")
    assert entry == process.entry
    assert entry is not None
    found = launcher.adopt(entry)
    assert found is not None
    assert launcher.adopt(entry.model_copy(update={"shim_start_ticks": entry.shim_start_ticks + 1})) is None
    assert launcher.adopt(entry.model_copy(update={"boot_id": "another"})) is None
    assert launcher.adopt(entry.model_copy(update={"shim_pid": 0})) is None
    found.kill()
    first, second = await process.wait(), await found.wait()
    assert first == second
    assert launcher.adopt(entry) is None


async def test_its_socket_is_for_its_owner_only(launcher: LocalLauncher, eventually_async: Callable[..., Any]) -> None:
    process = launcher.start(spec(), QUICK)
    path = process.endpoint.uds
    assert path is not None
    await eventually_async(path.exists, "its socket")
    secure(process.endpoint)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    process.kill()
    await process.wait()
    launcher.discard("chat-0")
    assert not path.exists()


async def test_a_large_log_is_set_aside_and_each_start_reads_its_own_part(launcher: LocalLauncher) -> None:
    log = launcher.paths.log("chat-0")
    log.write_bytes(b"old\n" * (LOG_LIMIT_BYTES // 4 + 1))
    first = launcher.start(spec("--die", "first"), QUICK)
    await first.wait()
    assert log.with_name("chat-0.log.1").stat().st_size > LOG_LIMIT_BYTES
    second = launcher.start(spec("--die", "second"), QUICK)
    await second.wait()
    assert "first" not in written(launcher, second)
    assert "second" in written(launcher, second)
    assert "SECRET" not in log.read_text(encoding="utf-8")


async def test_on_mig_the_plugin_is_on_the_engines_path_and_in_no_specification(
    launcher: LocalLauncher, eventually_async: Callable[..., Any]
) -> None:
    mig = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 2**33, uuid="MIG-a")
    wanted = replace(spec(target=mig), environment={"PYTHONPATH": "/theirs", "VLLM_PLUGINS": "theirs"})
    process = launcher.start(wanted, QUICK)
    engine = psutil.Process(process.entry.engine_pid)
    environment = await eventually_async(lambda: "VLLM_PLUGINS" in engine.environ() and engine.environ(), "it runs")
    first, *others = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "sliceway_mig" / "__init__.py").is_file()
    assert others == ["/theirs"]
    assert environment["VLLM_PLUGINS"] == "theirs,sliceway_mig"
    assert process.entry.spec_hash == wanted.spec_hash, "a newer plugin is no reason to restart it"
    process.kill()
    await process.wait()
