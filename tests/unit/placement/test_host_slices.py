from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cgroup import ControlGroup
from placement.cores import format_cores, parse_cores
from placement.errors import InventoryError
from placement.host import Host, cut, read_host
from placement.schema import CpuFleet
from placement.slices import Slice

GIB = 2**30


def host(cores: int, *, threads: int = 1, gib: float = 100, quota: float | None = None) -> Host:
    """`cores` physical cores; thread t of core c is numbered c + t * cores, as Linux does."""
    return Host(tuple(tuple(c + t * cores for t in range(threads)) for c in range(cores)), int(gib * GIB), quota)


def core_sets(slices: tuple[Slice, ...]) -> list[tuple[int, ...]]:
    return [s.cores for s in slices]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


# ---- cutting


@pytest.mark.parametrize(
    ("machine", "sets"),
    [
        (host(1), [(0,)]),
        (host(2), [(0,), (1,)]),
        (host(1, threads=2), [(0,), (1,)]),
        (host(4, threads=2), [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (host(7), [(i,) for i in range(7)]),
        (host(16), [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)]),
    ],
)
def test_automatic_slices_are_whole_cores_at_most_seven(machine: Host, sets: list[tuple[int, ...]]) -> None:
    slices, _ = cut(machine, CpuFleet())
    assert core_sets(slices) == sets
    assert [s.id for s in slices] == [f"cpu-{i}" for i in range(len(sets))]


def test_one_core_gives_one_slice_and_says_so() -> None:
    slices, notes = cut(host(1), CpuFleet(slices=2))
    assert len(slices) == 1
    assert notes == ("2 cpu slices were asked for, but there is 1 core; there is 1 slice.",)
    assert "one core" in " ".join(cut(host(1), CpuFleet())[1])


def test_threads_of_one_core_stay_together_unless_there_are_too_few_cores() -> None:
    assert core_sets(cut(host(4, threads=2), CpuFleet(slices=2))[0]) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    slices, notes = cut(host(2, threads=2), CpuFleet(slices=4))
    assert sorted(core_sets(slices)) == [(0,), (1,), (2,), (3,)]
    assert "4 slices share physical cores" in notes[0]


def test_what_does_not_divide_evenly_is_left_to_the_gateway() -> None:
    slices, notes = cut(host(5), CpuFleet(slices=2))
    assert core_sets(slices) == [(0, 1), (2, 3)]
    assert "Cores 4 are in no slice" in notes[0]


def test_a_quota_of_the_control_group_counts_as_cores() -> None:
    slices, notes = cut(host(8, quota=2.5), CpuFleet())
    assert core_sets(slices) == [(0,), (1,)]
    assert "2.5 cores' worth" in notes[0]


def test_memory_is_an_equal_share_of_nine_tenths_or_what_is_asked_for() -> None:
    assert [s.memory_bytes for s in cut(host(2, gib=20), CpuFleet())[0]] == [9 * GIB, 9 * GIB]
    assert cut(host(2, gib=20), CpuFleet(memory=10 * GIB))[0][0].memory_bytes == 10 * GIB
    with pytest.raises(InventoryError, match=r"are 22\.0GiB, but this machine has 20\.0GiB") as error:
        cut(host(2, gib=20), CpuFleet(memory=11 * GIB))
    assert "9.0GiB per slice" in str(error.value.remedy)


@given(st.integers(1, 24), st.integers(1, 2), st.integers(1, 30))
def test_slices_never_share_a_thread_and_are_of_one_size(cores: int, threads: int, wanted: int) -> None:
    machine = host(cores, threads=threads)
    slices, _ = cut(machine, CpuFleet(slices=wanted))
    assert len(slices) == min(wanted, cores * threads)
    everything = [core for s in slices for core in s.cores]
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(machine.threads)
    assert len({len(s.cores) for s in slices}) == 1


# ---- reading


def test_cores_memory_and_siblings_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
            "proc/self/cgroup": "0::/\n",
            **{
                f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}\n"
                for i in range(4)
            },
            "sys/devices/system/node/node0/cpulist": "1,3",
            "sys/devices/system/node/node1/cpulist": "0,2",
        },
    )
    found = read_host(tmp_path, allowed=frozenset(range(4)))
    assert found == Host(((1, 3), (0, 2)), 16 * GIB)
    assert read_host(tmp_path, allowed=frozenset({0, 1})).cores == ((1,), (0,))


def test_a_machine_that_tells_no_memory_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemFree: 1 kB\n"})
    with pytest.raises(InventoryError):
        read_host(tmp_path, allowed=frozenset({0}))
    with pytest.raises(InventoryError, match="cannot be read"):
        read_host(tmp_path / "nowhere", allowed=frozenset({0}))


def test_limits_of_version_2_hold_on_every_level(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/memory.max": "4294967296\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
        },
    )
    group = ControlGroup(tmp_path)
    assert group.memory_limit_bytes() == 4 * GIB
    assert group.cpu_quota_cores() == 1.5


def test_limits_of_version_1_and_inside_a_container(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            # The path is the host's; inside, only the mount's root is there.
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    group = ControlGroup(tmp_path)
    assert group.memory_limit_bytes() == 2 * GIB
    assert group.cpu_quota_cores() is None


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
    )
    assert ControlGroup(tmp_path).memory_limit_bytes() is None
    assert ControlGroup(tmp_path / "nowhere").memory_limit_bytes() is None


# ---- core lists


@given(st.sets(st.integers(0, 300)))
def test_core_lists_round_trip(cores: set[int]) -> None:
    assert parse_cores(format_cores(cores)) == tuple(sorted(cores))


def test_core_lists_are_as_short_as_they_can_be() -> None:
    assert format_cores([8, 0, 1, 2, 3]) == "0-3,8"
    assert parse_cores(" 0-3,8\n") == (0, 1, 2, 3, 8)
    for wrong in ("3-1", "a", "1;2"):
        with pytest.raises(ValueError, match=wrong[0]):
            parse_cores(wrong)
