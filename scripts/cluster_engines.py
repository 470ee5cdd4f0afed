"""Two Ray nodes on this machine, each with a real vLLM replica on one core, and things lost: `python scripts/cluster_engines.py`.

The models and tenants are the demo's (`configs/demo.yaml`; `make engine models` installs what they need). Both tenants ask both models
through both gateways with the official `openai` client, all the time, while one engine is killed, and then the whole second node with
agent, controller, gateway and engine. A model with its only replica gone is refused with 503 and `Retry-After` until there is one again,
and what runs elsewhere must not notice.

Exits 1 if it does, if a refusal says anything else, or if a process is left at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from drilling import DrillFailed, add_steps, guarded, workplace
from ray_site import FIRST, RaySite
from ruamel.yaml import YAML

from model_registry.errors import SlicewayError
from placement.engines import find_engine_python

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.yaml"
SECOND = "second"
CHAT, EMBED = MODELS = ("chat", "embed")
TENANTS = ("acme", "globex")
MEMORY = "6GiB"
DAYS = "Name the days of the week."
SENTENCE = "A slice of a GPU is a small GPU of its own."
DIMENSIONS = 384
_PAUSE_SECONDS, _REFUSED_PAUSE_SECONDS = 0.5, 2.0  # who asks has the same two cores as the engines


@dataclass(frozen=True)
class Asked:
    """One request's end. `status` is None where no answer came, or one that broke off; `problem` is None where all is well."""

    began: float
    at: float
    gateway: int
    model: str
    tenant: str
    status: int | None = None
    retry_after: str | None = None
    problem: str | None = None

    @property
    def refused_well(self) -> bool:
        """Whether it was told that nobody can serve it, and when to come back."""
        return self.status == 503 and self.retry_after is not None


@dataclass
class Loss:
    """What came of a loss. Times in seconds from the kill; `taken_in` from the start of the node that comes back.

    `in_hand` failed and had begun before the kill; `refused` were told 503 with `Retry-After`; `failed` is everything else that went wrong,
    with the other model too.
    """

    model: str = ""
    seconds_to_notice: float = 0.0
    seconds_to_taken_in: float = 0.0
    seconds_to_serve: float = 0.0
    in_hand: int = 0
    refused: int = 0
    failed: int = 0
    answered_beside: int = 0
    told: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was counted. Times in seconds."""

    seconds_to_cluster: float = 0.0
    seconds_to_ready: float = 0.0
    engine: Loss | None = None
    node: Loss | None = None
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether only the model was away whose replica was, as it should be, and nothing is left."""
        losses = filter(None, (self.engine, self.node))
        return not self.left and all(
            loss.failed == 0 and loss.refused > 0 and loss.answered_beside > 0 for loss in losses
        )


class Engines(RaySite):
    """The demo on two nodes, each with one slice of one core."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, (FIRST, SECOND))
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise DrillFailed("two nodes need two cores, and this process may use one")
        self.cores = [str(cores[0]), str(cores[-1])]

    def write(self) -> None:
        """The demo's configuration, on a slice of one core. Raises DrillFailed without its models."""
        data: Any = YAML().load(DEMO)
        data["state_dir"] = str(self.directory / FIRST)
        data["fleet"] = {"slices": [{"kind": "cpu", "id": "cpu-0", "cores": self.cores[0], "memory": MEMORY}]}
        data["gateway"] = {"listen": f"127.0.0.1:{self.ports[0]}"}
        for model in data["models"]:
            source = (DEMO.parent / model["source"]).resolve()
            if not (source / "config.json").exists():
                raise DrillFailed(f"the model {model['name']!r} is not in {model['source']}; run: make models")
            model["source"] = str(source)
        YAML().dump(data, self.config)

    async def key(self, tenant: str) -> str:
        """A new API key, as an operator makes one."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway.cli", "keys", "create", tenant, "--config", str(self.config), "--json"),
            stdout=asyncio.subprocess.PIPE,
            env=self.environment(),
        )
        told, _ = await process.communicate()
        if process.returncode:
            raise DrillFailed(f"no key for {tenant}: exit code {process.returncode}")
        key: str = json.loads(told)["key"]
        return key

    def come_back(self) -> None:
        """The second node joins, for the first time or again."""
        self.join(SECOND, "--cores", self.cores[1], "--memory", MEMORY)

    def serving(self, *, gateways: tuple[int, ...] = (0, 1), models: tuple[str, ...] = MODELS) -> bool:
        """Whether every one of the gateways has a ready replica of every one of the models."""
        return all(self.ready(gateway, model) for gateway in gateways for model in models)

    def home(self, model: str) -> str:
        """The node that serves the model."""
        where = next(iter(self.ready(0, model).values()), "")
        return SECOND if where.startswith(f"{SECOND}/") else FIRST

    async def why_unplaced(self) -> list[str]:
        """What `sliceway node list` says of replicas without a slice."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway.cli", "node", "list", *self.address, "--json"),
            stdout=asyncio.subprocess.PIPE,
            env=self.environment(),
        )
        told, _ = await process.communicate()
        return [f"{replica}: {why}" for replica, why in json.loads(told or b"{}").get("unplaced", {}).items()]


class Tenants:
    """Both tenants in turn, asking each model through each gateway one request after another, until a gateway is left or all of it ends."""

    def __init__(self, ports: list[int], keys: dict[str, str]) -> None:
        self._ports, self._keys = ports, keys
        self._stop = [asyncio.Event() for _ in ports]
        self._asking: list[list[asyncio.Task[None]]] = []
        self.asked: list[Asked] = []

    @contextlib.asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """For as long as the block runs."""
        gateways = range(len(self._ports))
        self._asking = [[asyncio.create_task(self._one(g, m)) for m in MODELS] for g in gateways]
        try:
            yield
        finally:
            for gateway in gateways:
                await self.leave(gateway)

    async def leave(self, gateway: int) -> None:
        """Ask this one no more. Returns when it has answered what is under way."""
        self._stop[gateway].set()
        await asyncio.gather(*self._asking[gateway])

    def good(self, model: str, since: float, gateway: int | None = None) -> int:
        """How many requests that began after `since` were answered."""
        return sum(
            a.problem is None and a.model == model and a.began > since and gateway in (None, a.gateway)
            for a in self.asked
        )

    async def _one(self, gateway: int, model: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                (name, await stack.enter_async_context(client_of(self._ports[gateway], key)))
                for name, key in self._keys.items()
            ]
            for tenant, client in itertools.cycle(clients):
                if self._stop[gateway].is_set():
                    return
                self.asked.append(await ask(client, gateway, model, tenant))
                pause = _REFUSED_PAUSE_SECONDS if self.asked[-1].refused_well else _PAUSE_SECONDS
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop[gateway].wait(), pause)


def client_of(port: int, key: str) -> openai.AsyncOpenAI:
    """The official client, which tries nothing twice."""
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


async def ask(client: openai.AsyncOpenAI, gateway: int, model: str, tenant: str) -> Asked:
    """One streamed chat, or one embedding; what came of it."""
    began = time.monotonic()
    status, retry_after, problem = None, None, None
    try:
        await (chat(client) if model == CHAT else embed(client))
    except openai.APIStatusError as error:
        status, retry_after, problem = error.status_code, error.response.headers.get("retry-after"), str(error)
    except (openai.OpenAIError, DrillFailed) as error:
        problem = repr(error)
    return Asked(began, time.monotonic(), gateway, model, tenant, status, retry_after, problem)


async def chat(client: openai.AsyncOpenAI) -> str:
    """A few tokens. Raises DrillFailed for an answer without any."""
    stream = await client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": DAYS}],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [e.choices[0].delta.content async for e in stream if e.choices and e.choices[0].delta.content]
    if not "".join(pieces).strip():
        raise DrillFailed("an answer without words")
    return "".join(pieces)


async def embed(client: openai.AsyncOpenAI) -> None:
    """One sentence. Raises DrillFailed for a vector of another size."""
    answer = await client.embeddings.create(model=EMBED, input=SENTENCE)
    if len(answer.data[0].embedding) != DIMENSIONS:
        raise DrillFailed(f"an embedding of {len(answer.data[0].embedding)} numbers")


async def drill(cluster: Engines, report: Report, steps: Sequence[str]) -> None:
    """Everything that happens, in order; of the losses those in `steps`."""
    cluster.write()
    keys = {tenant: await cluster.key(tenant) for tenant in TENANTS}
    await bring_up(cluster, report)
    tenants = Tenants(cluster.ports, keys)
    async with tenants.asking():
        await answers(cluster, tenants, time.monotonic())
        for name in (n for n in STEPS if n in steps):
            await STEPS[name](cluster, tenants, report)
    report.requests = len(tenants.asked)


async def bring_up(cluster: Engines, report: Report) -> None:
    """Both nodes, until both gateways have both models."""
    began = time.monotonic()
    await cluster.start()
    report.seconds_to_cluster = time.monotonic() - began
    cluster.come_back()
    await cluster.until(cluster.serving, "both models in both gateways")
    report.seconds_to_ready = time.monotonic() - began
    say(f"ready after {report.seconds_to_ready:.0f} s")


async def answers(cluster: Engines, tenants: Tenants, since: float, *, gateways: tuple[int, ...] = (0, 1)) -> None:
    """Wait until each of the tenants has had an answer of each model through each of the gateways."""
    wanted = {(g, m, t) for g in gateways for m in MODELS for t in TENANTS}

    def there() -> bool:
        had = {(a.gateway, a.model, a.tenant) for a in tenants.asked if a.problem is None and a.began > since}
        return wanted <= had

    await cluster.until(there, "answers of every model to every tenant through every gateway", seconds=120)


async def lose_engine(cluster: Engines, tenants: Tenants, report: Report) -> None:
    """The chat model's engine is killed; the other model is asked all the while."""
    replica = next(iter(cluster.ready(0, CHAT)))
    engine = cluster.engines()[replica]
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    loss = report.engine = Loss(model=CHAT)
    loss.seconds_to_notice = await cluster.until(
        lambda: not any(cluster.ready(g, CHAT) for g in (0, 1)), "that the engine is gone"
    )
    await cluster.until(cluster.serving, "another engine in both gateways")
    await cluster.until(lambda: all(tenants.good(CHAT, killed, g) for g in (0, 1)), "answers of the new engine")
    loss.seconds_to_serve = time.monotonic() - killed
    if cluster.engines()[replica] == engine:
        raise DrillFailed("the engine that was killed serves")
    await answers(cluster, tenants, time.monotonic())
    count(report, loss, tenants, killed)
    say(f"engine killed: {loss}")


async def lose_node(cluster: Engines, tenants: Tenants, report: Report) -> None:
    """The second node goes without a word, and comes back. Its gateway's clients go elsewhere, as a load balancer sees to."""
    lost = next(model for model in MODELS if cluster.home(model) == SECOND)
    await tenants.leave(1)
    killed = time.monotonic()
    await asyncio.to_thread(cluster.kill, SECOND)
    loss = report.node = Loss(model=lost)
    loss.seconds_to_notice = await cluster.until(lambda: not cluster.ready(0, lost), "that the node is lost")
    await cluster.until(lambda: _told_of(tenants, lost, killed), "a refusal", seconds=60)
    await cluster.until(lambda: f"{lost}-0 has no slice" in cluster.said(FIRST), "why it does not run", seconds=60)
    loss.told = await cluster.why_unplaced()
    again = time.monotonic()
    cluster.come_back()
    await cluster.until(cluster.serving, "both models in both gateways again")
    loss.seconds_to_taken_in = time.monotonic() - again
    await answers(cluster, tenants, again, gateways=(0,))
    loss.seconds_to_serve = time.monotonic() - killed
    count(report, loss, tenants, killed)
    say(f"node lost: {loss}")


def _told_of(tenants: Tenants, model: str, since: float) -> bool:
    return any(a.refused_well and a.model == model and a.began > since for a in tenants.asked)


Step = Callable[[Engines, Tenants, Report], Awaitable[None]]
STEPS: dict[str, Step] = {"engine": lose_engine, "node": lose_node}


def count(report: Report, loss: Loss, tenants: Tenants, killed: float) -> None:
    """What came of the requests that ended after the kill."""
    for one in (a for a in tenants.asked if a.at > killed):
        if one.problem is None:
            loss.answered_beside += one.model != loss.model
        elif one.model == loss.model and one.began < killed:
            loss.in_hand += 1
        elif one.model == loss.model and one.refused_well:
            loss.refused += 1
            loss.told += [text for text in (one.problem,) if text not in loss.told]
        else:
            loss.failed += 1
            report.failures.append(f"{one.model} through gateway {one.gateway}, {one.at - killed:.1f} s: {one.problem}")


def say(text: str) -> None:
    """How far it is, beside the report."""
    sys.stderr.write(f"{text}\n")


async def run(directory: Path, steps: Sequence[str]) -> Report:
    """All of it. Raises DrillFailed."""
    try:
        find_engine_python("cpu")
    except SlicewayError as error:
        raise DrillFailed(f"{error}; run: make engine") from error
    cluster, report = Engines(directory), Report()
    with guarded(cluster.mark):
        try:
            await drill(cluster, report, steps)
        except DrillFailed:
            say(f"until then: {json.dumps(asdict(report))}")
            raise
        finally:
            report.left = await asyncio.to_thread(cluster.end)
    return report


def main() -> int:
    """Run the drill; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_steps(parser, STEPS, "what is to be lost; both")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    chosen = parser.parse_args()
    with workplace(chosen.keep, "cluster-engines-") as directory:
        try:
            report = asyncio.run(run(directory, chosen.steps))
        except DrillFailed as error:
            sys.stderr.write(f"{error}\n")
            return 1
    shown = asdict(report) | {"ok": report.ok}
    sys.stdout.write(json.dumps(shown, indent=None if chosen.json else 1) + "\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
