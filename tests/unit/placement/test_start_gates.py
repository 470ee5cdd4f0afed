"""Who may start an engine when: one per GPU, as many at once as the host bears, and one to fill a cache."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from placement.replicas.gates import StartGates, is_filled, mark_filled, starts_at_once
from placement.slices import Gpu, Slice, SliceKind


def on(gpu: str, place: int = 0) -> Slice:
    card = Gpu(gpu, 0, "H100", 2**36)
    return Slice(f"{gpu}/1g.10gb@{place}", SliceKind.MIG, "1g.10gb", 2**33, uuid=f"MIG-{gpu}-{place}", gpu=card)


@dataclass
class Starts:
    """Starts through `gates` that end when they are told to."""

    gates: StartGates
    running: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    ends: dict[str, asyncio.Event] = field(default_factory=dict)

    async def begin(self, name: str, target: Slice, cache: Path | None = None, *, fills: bool = False) -> None:
        self.ends[name] = asyncio.Event()

        async def start() -> None:
            async with self.gates.turn(target, cache, lambda words: self.said.__setitem__(name, words)):
                self.running.append(name)
                self.order.append(name)
                await self.ends[name].wait()
                self.running.remove(name)
                if fills and cache is not None:
                    mark_filled(cache)

        self.tasks[name] = asyncio.create_task(start())
        await settle()

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
        await asyncio.gather(*(self.tasks[name] for name in names))
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_engines_on_one_gpu_start_one_after_another_and_on_others_beside_them() -> None:
    starts = Starts(StartGates(at_once=8))
    for name, target in (("a0", on("a", 0)), ("a1", on("a", 1)), ("b0", on("b", 0))):
        await starts.begin(name, target)
    assert starts.running == ["a0", "b0"]
    assert starts.said == {"a1": "waiting for another engine to start on this GPU"}
    await starts.end("a0")
    assert starts.running == ["b0", "a1"]
    await starts.end("a1", "b0")


async def test_the_host_bounds_how_many_start_at_once() -> None:
    starts = Starts(StartGates(at_once=2))
    for gpu in "abc":
        await starts.begin(gpu, on(gpu))
    assert starts.running == ["a", "b"]
    assert starts.said == {"c": "waiting, 2 engines are starting on this machine"}
    await starts.end("b")
    assert starts.running == ["a", "c"]
    await starts.end("a", "c")
    assert (starts_at_once(2), starts_at_once(112)) == (2, 28)


async def test_one_engine_fills_a_cache_and_the_others_then_start_together(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    starts = Starts(StartGates(at_once=8))
    for gpu in "abc":
        await starts.begin(gpu, on(gpu), cache, fills=True)
    assert starts.running == ["a"]
    assert "compilation cache" in starts.said["b"]
    await starts.begin("d", on("d"), tmp_path / "another")
    assert starts.running == ["a", "d"], "another model's cache is another's to fill"
    await starts.end("a")
    assert is_filled(cache)
    assert sorted(starts.running) == ["b", "c", "d"]
    await starts.end("b", "c", "d")


async def test_a_start_that_fails_lets_the_next_one_fill_the_cache(tmp_path: Path) -> None:
    starts = Starts(StartGates(at_once=8))
    cpu = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))
    for name in ("first", "second"):
        await starts.begin(name, cpu, tmp_path / "cache")
    assert starts.running == ["first"]
    await starts.end("first")
    assert starts.running == ["second"]
    await starts.end("second")


async def test_who_is_cancelled_while_waiting_or_starting_leaves_every_gate_open(tmp_path: Path) -> None:
    starts = Starts(StartGates(at_once=1))
    for number, gpu in enumerate("aab"):
        await starts.begin(f"{gpu}{number}", on(gpu, number), tmp_path / gpu)
    for task in starts.tasks.values():
        task.cancel()
    await asyncio.gather(*starts.tasks.values(), return_exceptions=True)
    starts.running.clear()
    await starts.begin("next", on("a"), tmp_path / "a")
    assert starts.running == ["next"]
    await starts.end("next")
