"""What the replicas of one machine reach the world through: processes, probes, logs, turns to start, and proofs of their places."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from model_registry.model import Task
from placement.calibration import CalibratedRegistry
from placement.clock import Clock
from placement.evidence import ReplicaTrace, prove_replica
from placement.goals import Workshop
from placement.launch import Endpoint
from placement.proof import Proof
from placement.replicas.gates import StartGates, mark_filled, starts_at_once
from placement.replicas.journal import JournalEntry
from placement.replicas.parts import Goal, Hands
from placement.replicas.probe import Probe
from placement.replicas.process import LocalLauncher, read_log, secure
from placement.schema import EngineConfig
from placement.wake_times import WAKE_TIMES_FILE, WakeTimes

_PROOF_SECONDS = 5.0


class Workbench:
    """Makes the hands of replicas. `engine` and `registry` are those of the configuration in force; both may change."""

    def __init__(
        self,
        workshop: Workshop,
        launcher: LocalLauncher,
        clock: Clock,
        jitter: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.engine = EngineConfig()
        self.registry: CalibratedRegistry | None = None
        self.wake_times = WakeTimes(workshop.paths.root / WAKE_TIMES_FILE)
        self._workshop = workshop
        self._paths = workshop.paths
        self._launcher = launcher
        self._clock = clock
        self._jitter = jitter
        self._changed = changed
        self._gates = StartGates(at_once=starts_at_once(len(os.sched_getaffinity(0))))

    def hands(self) -> Hands:
        """Everything a replica reaches the world through."""
        return Hands(
            start=self._launcher.start,
            probe=self.probe,
            read_log=self.read_log,
            secure=secure,
            prove=self._prove,
            gate=self._gate,
            clock=self._clock,
            jitter=self._jitter,
            changed=self._changed,
            learned=self.wake_times.learn,
        )

    def probe(self, endpoint: Endpoint, model: str, task: Task) -> Probe:
        """Questions to the engine that listens there."""
        network = self.engine.network
        if network is not None and not endpoint.secret:  # it was started before each had a secret of its own
            endpoint = replace(endpoint, secret=network.secret())
        return Probe(endpoint, model, task)

    def read_log(self, entry: JournalEntry) -> str:
        """What the engine of `entry` has written."""
        return read_log(self._paths.log(entry.replica), entry.log_offset)

    def _gate(self, goal: Goal, say: Callable[[str], None]) -> contextlib.AbstractAsyncContextManager[object]:
        if self.engine.parallel_starts is not None:
            self._gates.at_once = self.engine.parallel_starts
        return self._gates.turn(goal.slice, goal.spec.cache if goal.spec else None, say)

    async def _prove(self, goal: Goal, entry: JournalEntry) -> Proof:
        """Look where an engine that answers runs. What it was started with is known if this goal could start it."""
        arguments = goal.spec.argv if goal.spec else ()
        probe = self.probe(Endpoint.parse(entry.endpoint, secret=entry.secret), goal.model, goal.task)
        trace = ReplicaTrace(
            entry.shim_pid,
            arguments,
            self._paths.log(entry.replica),
            entry.log_offset,
            metrics=await probe.text("/metrics", timeout_seconds=_PROOF_SECONDS) or "",
            models=await probe.text("/v1/models", timeout_seconds=_PROOF_SECONDS) or "",
        )

        def look() -> Proof:
            if self.registry is not None:
                self.registry.learn(goal.model, goal.slice, self.read_log(entry))
            proof = prove_replica(goal.slice, trace, vllm=self._vllm_version(arguments))
            if proof.ok and goal.spec and goal.spec.cache:
                mark_filled(goal.spec.cache)
            return proof

        return await asyncio.to_thread(look)

    def engine_version(self, goal: Goal) -> str | None:
        """The version of vLLM that `goal` starts; None for another engine, a simulated one, or one found running."""
        if goal.spec is None or goal.slice.simulated:
            return None
        return self._vllm_version(goal.spec.argv)

    def _vllm_version(self, arguments: Sequence[str]) -> str | None:
        """The version that these arguments start; None for another engine."""
        if self.engine.command or not arguments:
            return None
        return self._workshop.versions.of(Path(arguments[0]))
