"""A real vLLM engine behind its secret and TLS, and what strangers get of it: `python scripts/engine_access.py`.

The demo's chat model (`make engine models` installs what it needs) under `sliceway up`, on TCP with `engine.tls`: certificates as docs/security.md
makes them, a stream through the gateway, every route of the engine without its secret, a client that trusts another authority, one that
speaks no TLS, a certificate that is renewed under the running engine, and a gateway that trusts somebody else.

Exits 1 if a stranger is answered, or the gateway is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from drilling import DrillFailed, Site, until
from ruamel.yaml import YAML

from placement.engine_tls import client_context
from placement.table import ReplicaRow, RoutingTable

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.yaml"
KEPT_SECONDS = (
    7.0  # longer than vLLM keeps a connection that nobody uses (5 s), so that the next request makes another one
)
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_TIMEOUT = aiohttp.ClientTimeout(total=30)


@dataclass
class Strangers:
    """What an engine at `endpoint` said to those who are not its gateway. `open` are routes that it answered without its secret."""

    endpoint: str
    routes: int = 0
    open: list[str] = field(default_factory=list)
    with_secret: int = 0
    other_authority: str = "answered"
    without_tls: str = "answered"

    @property
    def ok(self) -> bool:
        """Whether nobody was let in but who shows the secret."""
        shut = "answered" not in (self.other_authority, self.without_tls)
        return shut and not self.open and self.routes > 10 and self.with_secret == 200


@dataclass
class Report:
    """What came of it. `words` is the length of the answer that was streamed through the gateway."""

    strangers: Strangers | None = None
    words: int = 0
    renewed: bool = False
    misled: str = ""
    after: int = 0

    @property
    def ok(self) -> bool:
        """Whether the gateway was answered, and no stranger."""
        answered = self.words > 0 and self.after > 0 and self.renewed
        return answered and "engine.tls" in self.misled and self.strangers is not None and self.strangers.ok


def authority(folder: Path, name: str) -> Path:
    """An authority's certificate in `folder`, its key beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}.pem"
    _openssl("-days", "2", "-subj", f"/CN={name}", "-keyout", made.with_suffix(".key"), "-out", made)
    return made


def pair(by: Path, address: str) -> Mapping[str, Path]:
    """`engine.tls` with a certificate for `address` that the authority `by` has signed, in its folder; both files are replaced."""
    files = {"certificate": by.parent / "certificate.pem", "key": by.parent / "key.pem"}
    fresh = {name: path.with_suffix(".new") for name, path in files.items()}
    names = (*("-addext", f"subjectAltName=IP:{address}"), *("-addext", "basicConstraints=critical,CA:FALSE"))
    signed = ("-CA", by, "-CAkey", by.with_suffix(".key"), "-days", "1", "-subj", "/CN=node", *names)
    _openssl(*signed, "-keyout", fresh["key"], "-out", fresh["certificate"])
    for name, path in files.items():
        fresh[name].replace(path)
    return {**files, "authority": by}


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", "req", "-x509", *_CURVE, *map(str, words)], check=True, capture_output=True)


async def strangers(row: ReplicaRow, trusted: Path, other: Path) -> Strangers:
    """Ask the engine of `row` as those do who do not belong to it. `trusted` has signed its certificate, `other` has not."""
    base, found = str(row.endpoint), Strangers(str(row.endpoint))
    shown = {"authorization": f"Bearer {row.secret}"}
    async with _session(client_context(trusted)) as session:
        async with session.get(f"{base}/openapi.json", headers=shown) as answer:
            found.with_secret, document = answer.status, await answer.json()
        routes = {(m.upper(), p) for p, methods in document["paths"].items() for m in methods}
        routes |= {("GET", p) for p in ("/health", "/metrics", "/docs", "/openapi.json", "/nowhere")}
        routes |= {("OPTIONS", "/v1/models"), ("POST", "/sleep"), ("POST", "/collective_rpc")}
        found.routes = len(routes)
        for method, path in sorted(routes):
            for headers in ({}, {"authorization": f"Bearer {'0' * 64}"}):
                async with session.request(method, base + path, headers=headers) as answer:
                    if answer.status != 401:
                        found.open.append(f"{method} {path}: {answer.status}")
    found.other_authority = await _refusal(base, client_context(other), shown)
    found.without_tls = await _refusal(base.replace("https:", "http:"), None, shown)
    return found


def _session(context: ssl.SSLContext | None) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(ssl=context) if context is not None else aiohttp.TCPConnector()
    return aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)


async def _refusal(base: str, context: ssl.SSLContext | None, headers: Mapping[str, str]) -> str:
    try:
        async with _session(context) as session, session.get(f"{base}/v1/models", headers=headers):
            return "answered"
    except aiohttp.ClientError as error:
        return type(error).__name__


class OneEngine(Site):
    """The demo's chat model alone, on TCP with TLS."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.authority = authority(directory / "tls", "engines")
        self.other = authority(directory / "other", "somebody else")

    def configure(self) -> None:
        """The demo's configuration, with one model. Raises DrillFailed without it."""
        demo: Any = YAML(typ="safe").load(DEMO)
        chat = next(model for model in demo["models"] if model["name"] == "chat")
        source = (DEMO.parent / chat["source"]).resolve()
        if not (source / "config.json").exists():
            raise DrillFailed(f"the chat model is not in {chat['source']}; run: make models")
        tls = {name: str(path) for name, path in pair(self.authority, "127.0.0.1").items()}
        self.write(
            {
                "version": "v1",
                "state_dir": str(self.paths.root),
                "fleet": {"discover": "cpu", "cpu": {"slices": 1}},
                "engine": {"transport": "tcp", "tls": tls},
                "models": [{**chat, "source": str(source)}],
                "gateway": {"listen": f"127.0.0.1:{self.port}", "authentication": "none"},
            }
        )

    def row(self) -> ReplicaRow:
        """The engine as gateways know it."""
        table = RoutingTable.model_validate_json(self.paths.routing_table.read_bytes())
        return table.replicas[0]

    def shown(self) -> str:
        """The certificate that the engine shows to a new connection."""
        host, _, port = str(self.row().endpoint).removeprefix("https://").partition(":")
        return ssl.get_server_certificate((host, int(port)), timeout=30)

    async def ask(self) -> tuple[int, str]:
        """A streamed answer through the gateway: the status, and the words or the refusal."""
        body = {"model": "chat", "stream": True, "max_tokens": 12, "messages": [{"role": "user", "content": "Say so."}]}
        body["ignore_eos"] = True
        url = f"{self.url}/v1/chat/completions"
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.post(url, json=body) as answer:
            text = await answer.text()
        whole = answer.status == 200 and text.rstrip().endswith("data: [DONE]")
        return answer.status, _words(text) if whole else text

    async def told(self) -> str:
        """What `/readyz` says."""
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(f"{self.url}/readyz") as answer:
            return await answer.text()


def _words(stream: str) -> str:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ()))


async def drill(site: OneEngine, report: Report) -> None:
    """Everything that is asked, in order."""
    site.configure()
    await site.start()
    took = await until(site.ready, "a ready engine", site, seconds=900)
    sys.stderr.write(f"ready after {took:.0f} s\n")
    report.words = len((await site.ask())[1])
    report.strangers = await strangers(site.row(), site.authority, site.other)

    before = site.shown()
    pair(site.authority, "127.0.0.1")
    await until(lambda: site.shown() != before, "the renewed certificate for new connections", site, seconds=60)
    report.renewed = True
    await asyncio.sleep(KEPT_SECONDS)
    report.words = min(report.words, len((await site.ask())[1]))

    right = site.authority.read_bytes()
    site.authority.write_bytes(site.other.read_bytes())
    await _answered(site, 503)
    report.misled = await _why_out(site)
    site.authority.write_bytes(right)
    await _answered(site, 200)
    report.after = len((await site.ask())[1])


async def _answered(site: OneEngine, wanted: int, *, tries: int = 12) -> int:
    """Ask until the gateway answers so, each time on a connection of its own to the engine."""
    for _ in range(tries):
        await asyncio.sleep(KEPT_SECONDS)
        status, text = await site.ask()
        if status == wanted:
            return status
    raise DrillFailed(f"the gateway does not answer {wanted} but {status}: {text[-500:]}\n{site.said()}")


async def _why_out(site: OneEngine, *, tries: int = 12) -> str:
    """Ask until `/readyz` says why the engine is out of service: a single failure may be a chance."""
    for _ in range(tries):
        told: dict[str, Any] = json.loads(await site.told())
        (row,) = told["models"]["chat"]["replicas"]
        if row["state"] != "ready":
            return str(row["reason"])
        await site.ask()
    raise DrillFailed(f"/readyz does not tell that the engine is out of service: {told}")


async def run(directory: Path) -> Report:
    """All of it. Raises DrillFailed."""
    site, report = OneEngine(directory), Report()
    with site.guarded():
        try:
            await drill(site, report)
        finally:
            await site.stop()
    return report


def main() -> int:
    """Run it; the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory(prefix="engine-access-") as directory:
        try:
            report = asyncio.run(run(Path(directory)))
        except DrillFailed as error:
            sys.stderr.write(f"{error}\n")
            return 1
    sys.stdout.write(json.dumps(asdict(report) | {"ok": report.ok}, indent=1) + "\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
