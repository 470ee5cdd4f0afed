"""Random changes of a simulated fleet under load, with kills: `python scripts/transition_drill.py --gpus 2 --rounds 5 --seed 1 --kill`.

`sliceway up` serves simulated H100s that the plan cuts. Round after round another configuration is drawn (models added and
removed, more and fewer replicas, other profiles and limits, a tenant with replicas of its own, a reservation, a cordoned GPU)
and applied, while clients stream all the time. With `--kill` the controller or the `apply` itself is killed (`kill -9`) at a
random step; `up` starts the controller again, and the drill starts `apply` again.

All the time it is checked that every demand has the replicas in the routing table that it had before and will have
afterwards, in every generation of the table; that no request failed that had to be served, and none broke off. After every round: what
runs is what was asked for, there is nothing left to plan, no journal, no order, no process and no reservation too many.

Exits 1 and says the seed if anything of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drilling import ENGINE, Answer, Clients, DrillFailed, Site, Wish, until
from transition_targets import TENANTS, Target, first, following, kept

from placement.errors import TableUnreadable
from placement.locks import holder
from placement.orders import read_orders
from placement.renewals import RENEWALS_FILE
from placement.table import RoutingTable, read
from placement.transition.journal import JOURNAL_FILE

TIMING = "--output-tokens 12 --ttft-seconds 0.05 --itl-seconds 0.02"
_LOOK_SECONDS = 0.01
_MOST_APPLIES = 4
_MOST_PAUSE_SECONDS = 0.4
_KILLED_ROUNDS = 0.7
# Refusals that are no failure where nobody was promised anything: unknown model, none ready, too many.
_REFUSALS = (403, 404, 429, 503)


@dataclass
class Report:
    """What the drill counted. Times in seconds; `forecast_seconds` and `took_seconds` are of rounds without kills, in order."""

    gpus: int
    seed: int
    rounds: int = 0
    applied: int = 0
    blocked: int = 0
    steps: int = 0
    killed_controllers: int = 0
    killed_applies: int = 0
    applies_again: int = 0
    generations: int = 0
    generations_unseen: int = 0
    requests: int = 0
    refused: int = 0
    without_generation: int = 0
    failures: list[str] = field(default_factory=list)
    undercut: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    forecast_seconds: list[float] = field(default_factory=list)
    took_seconds: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not (self.failures or self.undercut or self.wrong)


class TableWatch(threading.Thread):
    """Reads every generation of the routing table, and notes where a demand has fewer replicas than it is promised."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._last = 0
        self._over = threading.Event()
        self.floors: Mapping[str, int] = {}
        self.generations = 0
        self.unseen = 0
        self.undercut: list[tuple[str, int, str]] = []

    def run(self) -> None:
        """Until `end` is called."""
        while not self._over.wait(_LOOK_SECONDS):
            self._look()

    def end(self) -> None:
        """Stop looking, if it ever began."""
        self._over.set()
        if self.is_alive():
            self.join()

    def _look(self) -> None:
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_ino) == self._seen:
                return
            table = read(self._path)
        except (OSError, TableUnreadable):
            return
        self._seen = status.st_mtime_ns, status.st_ino
        if table.generation == self._last:
            return
        self.generations += 1
        self.unseen += max(0, table.generation - self._last - 1) if self._last else 0
        self._last = table.generation
        self._judge(table)

    def _judge(self, table: RoutingTable) -> None:
        routed = demands_of(table)
        for demand, floor in self.floors.items():
            if routed[demand] < floor:
                told = f"generation {table.generation}: {demand} has {routed[demand]} of {floor}"
                self.undercut.append((demand, floor - routed[demand], told))


def demands_of(table: RoutingTable) -> Counter[str]:
    """Replicas that take requests, by demand."""
    return Counter(
        r.replica.rpartition("-")[0] for name in {m.model for m in table.replicas} for r in table.ready(name)
    )


class Killer(threading.Thread):
    """Kills a process once so many steps are noted in the journal, and a little later."""

    def __init__(self, journal: Path, victim: int, *, after_steps: int, pause_seconds: float) -> None:
        super().__init__(daemon=True)
        self._journal = journal
        self._victim = victim
        self._after = after_steps
        self._pause = pause_seconds
        self._over = threading.Event()
        self.killed = False

    def run(self) -> None:
        """Until it is done, or `end` is called."""
        while not self._over.wait(_LOOK_SECONDS):
            done = steps_done(self._journal)
            if done is not None and done >= self._after:
                if self._over.wait(self._pause):
                    return
                try:
                    os.kill(self._victim, signal.SIGKILL)
                    self.killed = True
                except ProcessLookupError:
                    pass
                return

    def end(self) -> bool:
        """Kill nothing any more. Whether it did."""
        self._over.set()
        self.join()
        return self.killed


def steps_done(journal: Path) -> int | None:
    """How many steps of a transition under way are noted; None if none is under way."""
    try:
        return len(json.loads(journal.read_bytes())["done"])
    except (OSError, ValueError):
        return None


class Drill:
    """One fleet, from the first target to the last."""

    def __init__(self, site: Site, report: Report, generator: random.Random, *, clients: int, kill: bool) -> None:
        self._site = site
        self._report = report
        self._generator = generator
        self._wishing = random.Random(report.seed)  # apart, so that load does not change what is drawn
        self._kill = kill
        self._keys: dict[str, str] = {}
        self._target = first(report.gpus)
        self._after = self._target
        self._changed_at = 0.0
        self._watch = TableWatch(site.paths.routing_table)
        self._clients = Clients(site.url, clients, self._wish)
        self._judged = 0

    async def run(self, rounds: int) -> None:
        """Everything, in order, and what was counted as far as it came."""
        try:
            await self._run(rounds)
        finally:
            self._watch.end()
            self._report.generations, self._report.generations_unseen = self._watch.generations, self._watch.unseen
            self._report.requests = len(self._clients.answers)

    async def _run(self, rounds: int) -> None:
        self._write(self._target)
        with self._site.guarded():
            for tenant in TENANTS:
                _, made = await self._site.asked("keys", "create", tenant)
                self._keys[tenant] = made["key"]
            await self._site.start()
            self._watch.start()
            await until(lambda: self._serving(self._target), "the first target serves", self._site)
            async with self._clients.sending():
                await self._served(self._target)
                self._judged = len(self._clients.answers)  # before, the gateway may not have known every replica
                self._watch.floors = self._target.floors
                for _ in range(rounds):
                    await self._round()
            await self._site.stop()
            left = self._site.processes()
            if left:
                self._report.wrong.append(f"left behind at the end: {dict(left)}")

    async def _round(self) -> None:
        report, before = self._report, self._target
        after = following(before, self._generator, report.gpus)
        report.rounds += 1
        self._say(f"round {report.rounds}: {after.sections()}")
        self._promise(before, after)
        self._write(after)
        _, planned = await self._site.asked("plan")
        fleet = (planned or {}).get("fleet") or {}
        blocked = bool(fleet.get("transition", {}).get("blocked")) or _undercut((planned or {}).get("engines"))
        if blocked or not fleet.get("met"):
            await self._refused(before, after, blocked=blocked)
            return
        steps = fleet["transition"]["steps"]
        report.steps += len(steps)
        began, quiet = time.monotonic(), await self._apply(steps)
        if quiet and steps:
            report.forecast_seconds.append(round(fleet["transition"]["seconds"], 1))
            report.took_seconds.append(round(time.monotonic() - began, 1))
        report.applied += 1
        self._target = self._after = after
        await self._served(after)
        await self._check(after)
        self._judge(before, after)
        self._watch.floors = after.floors

    def _promise(self, before: Target, after: Target) -> None:
        """What has to be there all along: what there was, as far as it will be afterwards."""
        self._after = after
        self._watch.floors = kept(before, after)

    async def _refused(self, before: Target, after: Target, *, blocked: bool) -> None:
        """A change that cannot be made without breaking a promise is refused by `apply`, and nothing has happened."""
        report = self._report
        report.blocked += 1
        if blocked:
            engines = self._site.engines()
            code, _ = await self._site.asked("apply")
            if code == 0:
                report.wrong.append("a plan without a safe order was carried out")
            if self._site.engines().keys() != engines.keys():
                report.wrong.append("a plan that was refused has changed something")
        self._write(before)
        self._after = before
        await self._site.asked("apply")
        self._judge(before, after)
        self._watch.floors = before.floors

    async def _apply(self, steps: list[Any]) -> bool:
        """`sliceway apply` until it is through, with a kill at some step. Whether nothing was killed."""
        victim = self._generator.choice(("controller", "apply")) if self._kill else ""
        strikes = bool(steps) and bool(victim) and self._generator.random() < _KILLED_ROUNDS
        at, pause = self._generator.randrange(max(1, len(steps))), self._generator.uniform(0, _MOST_PAUSE_SECONDS)
        for turn in range(_MOST_APPLIES):
            process = self._site.sliceway("apply", str(self._site.config))
            killer = self._killer(victim, process.pid, at, pause) if strikes and turn == 0 else None
            code = await asyncio.to_thread(process.wait, 300)
            killed = killer is not None and killer.end()
            if killed and victim == "controller":
                self._report.killed_controllers += 1
            elif killed:
                self._report.killed_applies += 1
            if code == 0:
                return not strikes and turn == 0
            if not (killed and victim == "apply"):
                self._report.applies_again += 1
                self._say(f"apply ended with {code} after the kill of {victim if killed else 'nobody'}")
            await until(lambda: holder(self._site.paths.controller_lock) is not None, "a controller", self._site)
            await until(lambda: self._site.status() is not None, "its status", self._site)
        raise DrillFailed(f"apply does not come to an end:\n{self._site.said()}")

    def _killer(self, victim: str, apply: int, at: int, pause: float) -> Killer:
        controller = holder(self._site.paths.controller_lock)
        pid = apply if victim == "apply" or controller is None else controller
        killer = Killer(self._site.paths.root / JOURNAL_FILE, pid, after_steps=at, pause_seconds=pause)
        killer.start()
        return killer

    async def _served(self, target: Target) -> None:
        """Wait until every model has answered both tenants, as soon as `apply` is through."""
        began, wanted = time.monotonic(), {(t, m) for t in TENANTS for m in target.models}
        if target.dedicated:
            wanted = {(t, m) for t, m in wanted if t != "acme" or m == target.dedicated}

        def all_served() -> bool:
            fresh = (a for a in self._clients.answers if a.began > began and a.problem is None)
            return wanted <= {(a.wish.tenant, a.wish.model) for a in fresh}

        try:
            await until(all_served, "every model answers every tenant", self._site, seconds=60)
        except DrillFailed:
            fresh = [a for a in self._clients.answers if a.began > began]
            served = {(a.wish.tenant, a.wish.model) for a in fresh if a.problem is None}
            told = Counter((a.wish.tenant, a.wish.model, a.problem) for a in fresh if a.problem)
            self._report.wrong.append(f"not served: {sorted(wanted - served)}; {told.most_common(4)}")

    async def _check(self, target: Target) -> None:
        """Is everything as it was asked for, and nothing else?"""
        site, wrong = self._site, self._report.wrong
        code, fleet = await self._planned(target)
        if code or fleet["changed"] or fleet["transition"]["steps"]:
            wrong.append(f"the plan after apply is not empty: {fleet['transition']['steps']}")
        if (site.paths.root / JOURNAL_FILE).exists():
            wrong.append("the journal is still there")
        if read_orders(site.paths).any:
            wrong.append(f"orders are left: {read_orders(site.paths)}")
        if not int(target.reserve) <= len(fleet["reserved"]) <= 1:  # what was made once is not touched again
            wrong.append(f"reserved: {fleet['reserved']}")
        await self._check_machine(target)

    async def _planned(self, target: Target) -> tuple[int, dict[str, Any]]:
        """What `plan` says once all serve. Where a replica that is replaced is somewhere for a while, when it is back."""
        site, renewals = self._site, self._site.paths.root / RENEWALS_FILE
        while True:
            await until(lambda: self._serving(target), f"{target.floors} serve", site, seconds=60)
            renewed = renewals.exists()
            code, planned = await site.asked("plan")
            if planned is None:
                raise DrillFailed(f"plan exited with {code}:\n{site.said()}")
            fleet = planned["fleet"]
            if not fleet["transition"]["steps"] or not (renewed or renewals.exists()):
                return code, fleet
            await until(lambda: not renewals.exists(), "nothing is replaced any more", site, seconds=180)

    async def _check_machine(self, target: Target) -> None:
        """One engine per replica, on a slice that the driver says it uses, and no other process."""
        site, wrong = self._site, self._report.wrong
        wanted = sum(target.floors.values())
        expected = Counter(up=1, controller=1, gateway=1, shim=wanted, engine=wanted)
        try:
            await until(lambda: site.processes() == expected, "no other process", site, seconds=20)
        except DrillFailed:
            wrong.append(f"processes: {dict(site.processes())} instead of {dict(expected)}")
        used = {one["id"] for one in await site.slices() if one["users"]}
        seats = {r.slice.id for r in site.ready().values()}
        if used != seats:
            wrong.append(f"slices in use: {sorted(used)} instead of {sorted(seats)}")

    def _serving(self, target: Target) -> bool:
        status = self._site.status()
        found = Counter(name.rpartition("-")[0] for name in self._site.ready())
        return found == Counter(target.floors) and status is not None and len(status.replicas) == sum(found.values())

    def _write(self, target: Target) -> None:
        sections = target.sections()
        content = {
            "version": "v1",
            "state_dir": str(self._site.paths.root),
            "engine": {
                "command": [*ENGINE.split(), *TIMING.split()],
                "drain_timeout_seconds": 30,
                "stop_timeout_seconds": 5,
            },
            "gateway": {"listen": f"127.0.0.1:{self._site.port}"},
            **sections,
        }
        simulated = {"discover": {"simulate": {"h100-sxm": self._report.gpus}}, "partition": "planned"}
        content["fleet"] = simulated | sections["fleet"]
        self._changed_at = time.monotonic()
        self._site.write(content)

    def _wish(self, client: int) -> Wish | None:
        """Any model of before or after, as any tenant; one that has a model of its own asks for that one."""
        models = sorted({*self._target.models, *self._after.models})
        tenant = TENANTS[client % len(TENANTS)]
        own = {t.dedicated for t in (self._target, self._after) if t.dedicated}
        if tenant == "acme" and own:
            models = sorted(own & set(models)) or models
        return Wish(self._wishing.choice(models), self._keys[tenant], tenant)

    def _judge(self, before: Target, after: Target) -> None:
        """Failures among what was answered since the last round. Who is in both targets had to be served."""
        fresh, self._judged = self._clients.answers[self._judged :], len(self._clients.answers)
        for answer in fresh:
            self._report.without_generation += answer.status is not None and answer.generation is None
            if answer.problem is None:
                continue
            if self._promised(answer, before, after) or answer.status not in _REFUSALS:
                told = f"round {self._report.rounds}: {answer.wish.tenant} {answer.wish.model} on {answer.replica}: {answer.problem}"
                self._report.failures.append(told)
            else:
                self._report.refused += 1
        self._report.undercut = [t for d, missing, t in self._watch.undercut if missing - (d in self._in_place()) > 0]

    def _in_place(self) -> set[str]:
        """Demands of which a replica was replaced in its place, since there was no room beside it: the controller says so."""
        path = self._site.paths.logs / "controller.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        found = re.findall(r"(\S+)-\d+: its turn to be replaced", text)
        self._report.in_place = sorted(found)
        return set(found)

    def _promised(self, answer: Answer, before: Target, after: Target) -> bool:
        """Whether the tenant might use the model all along, and replicas had to be there for it all along."""
        tenant, model, owners = answer.wish.tenant, answer.wish.model, (before.dedicated, after.dedicated)
        if tenant == "acme" and any(own not in (None, model) for own in owners):
            return False
        demand = f"{model}@acme" if tenant == "acme" and owners == (model, model) else model
        return kept(before, after, in_place=self._in_place()).get(demand, 0) > 0

    def _say(self, line: str) -> None:
        with self._site.log.open("a", encoding="utf-8") as log:
            log.write(f"-- {line}\n")


async def _run(chosen: argparse.Namespace, directory: Path) -> Report:
    site, report = Site(directory), Report(chosen.gpus, chosen.seed)
    drill = Drill(site, report, random.Random(chosen.seed), clients=chosen.clients, kill=chosen.kill)
    try:
        await drill.run(chosen.rounds)
    except DrillFailed as error:
        report.wrong.append(str(error))
    if not report.ok and chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
        (chosen.keep / f"seed-{chosen.seed}.log").write_text(_everything(site), encoding="utf-8")
    return report


def _undercut(engines: dict[str, Any] | None) -> bool:
    """Whether engines can only be replaced in their places, with less than is guaranteed meanwhile."""
    return any(not model["guarantee_kept"] for model in (engines or {}).get("models", ()))


def _everything(site: Site) -> str:
    texts = [site.log, *sorted(site.paths.logs.glob("*.log")), site.paths.orders_log]
    return "\n".join(f"== {p.name}\n{p.read_text(errors='replace', encoding='utf-8')}" for p in texts if p.exists())


def main() -> int:
    """Run the drill; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2, help="simulated H100s")
    parser.add_argument("--rounds", type=int, default=5, help="configurations to apply, one after the other")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn")
    parser.add_argument("--clients", type=int, default=4, help="clients that send one request after another")
    parser.add_argument("--kill", action="store_true", help="kill controller or apply in most rounds")
    parser.add_argument("--keep", type=Path, help="a directory for the logs of a drill that finds something")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="transition-drill-") as directory:
        report = asyncio.run(_run(chosen, Path(directory)))
    shown = asdict(report) | {"ok": report.ok}
    lines = json.dumps(shown, indent=1) if chosen.json else "\n".join(f"{k:20} {v}" for k, v in shown.items())
    print(lines)  # noqa: T201
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
