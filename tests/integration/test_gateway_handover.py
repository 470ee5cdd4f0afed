"""One gateway process takes over from another while requests run, on connections that are kept and on new ones."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from gateway.config import load_config
from gateway.ingress.handover import handover_path, serving_pid, take_over
from gateway.keys import Keystore
from gateway.testing import FakeFleet, fake_fleet, wait_until
from placement.state import SOCKET_PATH_BYTES, StatePaths
from tests.integration.gateway_harness import CHAT, chat_body, events

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


class Site:
    """A configuration, its engine, and where its gateway is asked."""

    def __init__(self, directory: Path, fleet: FakeFleet, tenants: list[dict[str, object]] | None = None) -> None:
        self.directory, self.fleet = directory, fleet
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.listen = f"127.0.0.1:{sock.getsockname()[1]}"
        self.url = f"http://{self.listen}"
        self.config = directory / "sliceway.yaml"
        state = directory / "state"
        gateway = {"listen": self.listen, "authentication": "none", "keep_alive_seconds": 5}
        models = [{"name": "m", "source": "x"}]
        self.config.write_text(
            json.dumps({"version": "v1", "state_dir": str(state), "models": models, "gateway": gateway}),
            encoding="utf-8",
        )
        self.key = ""
        if tenants:
            self._ask_for_keys(tenants)
        self.door = handover_path(StatePaths(state).runtime({}), self.listen)

    def _ask_for_keys(self, tenants: list[dict[str, object]]) -> None:
        raw = json.loads(self.config.read_text(encoding="utf-8")) | {"tenants": tenants}
        raw["gateway"]["authentication"] = "keys"
        self.config.write_text(json.dumps(raw), encoding="utf-8")
        self.key, _ = Keystore.of(load_config(self.config)).create(str(tenants[0]["name"]), now=1.0)

    def ask(self, max_tokens: int) -> httpx2.Response:
        head = {"authorization": f"Bearer {self.key}"}
        body = chat_body(stream=False, max_tokens=max_tokens)
        return httpx2.post(self.url + CHAT, json=body, headers=head, timeout=30)

    @contextmanager
    def process(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.directory / "gateway.log").open("ab") as log:
            command = [sys.executable, "-m", "gateway.cli", "gateway", str(self.config), *words]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or serving_pid(self.door) == process.pid, what="it serves")
            yield process
        finally:
            process.kill()
            process.wait()

    def said(self) -> str:
        return (self.directory / "gateway.log").read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with fake_fleet(tmp_path / "state") as fleet:
        fleet.start("m-0", "m", itl_seconds=0.01)
        yield Site(tmp_path, fleet)


class Asking(threading.Thread):
    """One request after another, on one connection that is kept, or each on its own."""

    def __init__(self, url: str, *, kept: bool) -> None:
        super().__init__()
        self._url, self._kept = url, kept
        self.stop = threading.Event()
        self.answers: list[object] = []

    def run(self) -> None:
        with httpx2.Client(timeout=30) as client:
            while not self.stop.is_set():
                try:
                    ask = client.post if self._kept else httpx2.post
                    answer = ask(self._url + CHAT, json=chat_body(stream=False))
                    self.answers.append(answer.status_code)
                except httpx2.TransportError as error:
                    self.answers.append(repr(error))


def test_no_request_fails_while_one_process_replaces_another(site: Site) -> None:
    with site.process() as first:
        askers = [Asking(site.url, kept=kept) for kept in (True, True, False)]
        for one in askers:
            one.start()
        try:
            stream = httpx2.stream("POST", site.url + CHAT, json=chat_body(max_tokens=100), timeout=30)
            with stream as answer, site.process("--take-over") as second:
                assert second.poll() is None, site.said()
                counts = [len(one.answers) for one in askers]
                wait_until(
                    lambda: all(len(one.answers) > n + 5 for one, n in zip(askers, counts, strict=True)),
                    what="answers of the second process",
                )
                whole = b"".join(answer.iter_bytes())
                assert events(whole.decode())[-1] == "[DONE]", "a stream of the first process comes to its end"
                for one in askers:
                    one.stop.set()
                    one.join()
                wait_until(lambda: first.poll() is not None, what="the first process has ended")
        finally:
            for one in askers:
                one.stop.set()
                one.join()
    assert first.returncode == 0
    assert {status for one in askers for status in one.answers} == {200}, site.said()


def test_a_successor_that_ends_before_it_serves_changes_nothing(site: Site) -> None:
    with site.process() as first:
        taken = take_over(site.door)
        assert taken is not None
        taken.sock.close()
        taken.line.close()
        assert httpx2.post(site.url + CHAT, json=chat_body(stream=False)).status_code == 200
        assert serving_pid(site.door) == first.pid
        with site.process() as third:
            assert third.wait(30) != 0, "the address is taken for who does not ask for it"


def test_what_a_tenant_used_counts_on_in_the_process_that_takes_over(tmp_path: Path) -> None:
    """An upgrade of the gateway is no way to a fresh budget."""
    with fake_fleet(tmp_path / "state") as fleet:
        fleet.start("m-0", "m", output_tokens=200)
        site = Site(tmp_path, fleet, tenants=[{"name": "acme", "limits": {"tokens_per_day": 4000}}])
        with site.process() as first:
            assert site.ask(3000).status_code == 200, "it fits at first"
            assert [site.ask(200).status_code for _ in range(8)] == [200] * 8
            with site.process("--take-over"):
                wait_until(lambda: first.poll() is not None, what="the first process has ended")
                assert site.ask(3000).status_code == 429, site.said()
                assert site.ask(200).status_code == 200, "the rest is there"


def test_where_nobody_serves_nothing_is_taken_over(site: Site) -> None:
    assert take_over(site.door) is None
    assert serving_pid(site.door) is None
    with site.process("--take-over"):
        assert httpx2.get(site.url + "/healthz").status_code == 200


def test_its_name_fits_wherever_an_engines_does(tmp_path: Path) -> None:
    """`runtime` leaves room for a name of this length, and sun_path for the longest process id in place of the ending."""
    name = handover_path(tmp_path, "127.0.0.1:8080").name
    assert len(name) <= len("0123456789ab.sock")
    assert SOCKET_PATH_BYTES + len(".4194304") - len(".sock") < 108
