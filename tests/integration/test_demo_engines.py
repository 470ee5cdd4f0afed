"""The main job on real engines: two vLLM replicas on two core sets, the gateway in front, and what goes wrong in practice.

The tests share one running service and stand in the order in which they run; `ready` waits until it is whole again, so each
of them also runs alone. A missing engine or model is a failure, never a skip: this is the suite that proves the main job.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from ruamel.yaml import YAML

from placement.engines import find_engine_python
from placement.errors import EngineMissing

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SLICEWAY = str(Path(sys.executable).parent / "sliceway")
START_SECONDS = 600.0
CHAT, EMBED = "chat", "embed"
COUNT = [{"role": "user", "content": "Count from one to a hundred, one number a line."}]


def until(condition: Callable[[], Any], *, seconds: float, what: str, every_seconds: float = 0.05) -> Any:
    """The first true value of `condition`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(every_seconds)
    pytest.fail(f"not within {seconds} s: {what}")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket: how the gateway reaches an engine, and the only way there is."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Service:
    """`sliceway up` in a session of its own, on a copy of the demo's configuration with its own state and port."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.state = directory / "state"
        self.log = directory / "up.log"
        self.config = directory / "config.yaml"
        YAML().dump(self._configuration(port), self.config)
        self._key: str | None = None
        self._clients: list[openai.OpenAI] = []
        self.up: subprocess.Popen[bytes] | None = None

    def _configuration(self, port: int) -> Any:
        demo = ROOT / "configs" / "demo.yaml"
        data = YAML().load(demo)
        data["state_dir"] = str(self.state)
        data["gateway"] = {"listen": f"127.0.0.1:{port}"}
        for model in data["models"]:
            source = (demo.parent / model["source"]).resolve()
            if not (source / "config.json").exists():
                pytest.fail(f"the model {model['name']!r} is not in {model['source']}; run: make models")
            model["source"] = str(source)
            if "chat_template" in model:
                model["chat_template"] = str((demo.parent / model["chat_template"]).resolve())
        return data

    # ---- its life

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.up = subprocess.Popen(
                [SLICEWAY, "up", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ensure_ready(self) -> None:
        """Start what is not running, and wait until every model has a ready replica behind the gateway."""
        if self.up is None or self.up.poll() is not None:
            self.start()
        until(self._whole, seconds=START_SECONDS, what=f"both models ready; `sliceway up` said: {self.said()[-3000:]}")

    def _whole(self) -> bool:
        assert self.up is not None
        if self.up.poll() is not None:
            pytest.fail(f"`sliceway up` ended with {self.up.returncode}: {self.said()[-3000:]}")
        rows = self.slices()
        if failed := [row["replica"] for row in rows if row["state"] == "failed"]:
            pytest.fail(f"{failed} cannot run: {self.said()[-3000:]}")
        return {row["model"] for row in rows if row["state"] == "ready"} == {CHAT, EMBED}

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        assert self.up is not None
        self.up.send_signal(signal_number)
        return self.up.wait(120)

    def said(self) -> str:
        return self.log.read_text(errors="replace", encoding="utf-8")

    # ---- what it shows

    def slices(self) -> list[dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"{self.url}/slices", timeout=5) as answer:
                shown = json.load(answer)
        except OSError:
            return []
        return [row for row in shown if row.get("model")]

    def row(self, model: str) -> dict[str, Any]:
        return next(row for row in self.slices() if row["model"] == model)

    def journals(self) -> dict[str, dict[str, Any]]:
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in self.state.glob("replicas/*/journal.json")]
        return {entry["model"]: entry for entry in entries}

    def engine_pids(self) -> dict[str, int]:
        return {model: entry["engine_pid"] for model, entry in self.journals().items()}

    def metric(self, model: str, name: str) -> float:
        endpoint = self.journals()[model]["endpoint"]
        connection = UnixConnection(endpoint.removeprefix("unix:"))
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        return sum(
            float(value) for value in re.findall(rf"^{re.escape(name)}\{{[^}}]*\}} ([0-9.e+]+)$", text, re.MULTILINE)
        )

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to it: `up` and its children, and each engine's shim with everything below."""
        roots = [entry["shim_pid"] for entry in self.journals().values()]
        roots += [self.up.pid] if self.up else []
        found: dict[int, psutil.Process] = {}
        for pid in roots:
            if psutil.pid_exists(pid):
                process = psutil.Process(pid)
                found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        return list(found.values())

    # ---- asking it

    def key(self) -> str:
        if self._key is None:
            command = [SLICEWAY, "keys", "create", "acme", "--config", str(self.config), "--json"]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            self._key = json.loads(done.stdout)["key"]
            # A running gateway takes notice of a new key within a second.
            until(lambda: self._accepts(str(self._key)), seconds=10, what="the gateway knows the new key")
        return self._key

    def _accepts(self, key: str) -> bool:
        request = urllib.request.Request(f"{self.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False

    def client(self, **settings: Any) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key(), timeout=120, **settings)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    try:
        find_engine_python("cpu")
    except EngineMissing as error:
        pytest.fail(f"{error}\nmake test installs it; by hand: make engine models")
    service = Service(tmp_path_factory.mktemp("demo"))
    try:
        yield service
    finally:
        left = service.processes()
        for process in left:
            with_suppressed_kill(process)
        psutil.wait_procs(left, timeout=20)


def with_suppressed_kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    running.ensure_ready()
    yield running
    running.close_clients()


def stream_chat(client: openai.OpenAI, *, max_tokens: int, **extra: Any) -> openai.Stream[Any]:
    return client.chat.completions.create(
        model=CHAT,
        messages=COUNT,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True} | extra,
    )


def text_of(stream: openai.Stream[Any]) -> list[str]:
    return [e.choices[0].delta.content for e in stream if e.choices and e.choices[0].delta.content]


def test_chat_streams_real_tokens(service: Service) -> None:
    events = list(stream_chat(service.client(), max_tokens=24, stream_options={"include_usage": True}))
    pieces = [e.choices[0].delta.content for e in events if e.choices and e.choices[0].delta.content]
    assert len(pieces) > 3, "an engine joins tokens when its reader is late, but not most of them"
    assert len(set("".join(pieces))) > 3, "the same token over and over is no language model"
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 24


def test_chat_in_one_piece_says_the_same(service: Service) -> None:
    whole = service.client().chat.completions.create(
        model=CHAT, messages=COUNT, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].message.content == "".join(text_of(stream_chat(service.client(), max_tokens=24)))


def test_a_small_model_still_knows_something(service: Service) -> None:
    days = "Monday, Tuesday, Wednesday, Thursday,"
    answer = service.client().completions.create(model=CHAT, prompt=days, max_tokens=4, temperature=0)
    assert "Friday" in answer.choices[0].text


def test_embeddings_mean_something(service: Service) -> None:
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on a couch.", "The stock market fell sharply."]
    answer = service.client().embeddings.create(model=EMBED, input=sentences)
    cat, kitten, market = (item.embedding for item in answer.data)
    assert len(cat) == 384

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    assert cosine(cat, kitten) > cosine(cat, market) + 0.2


def test_both_models_are_listed_and_wrong_use_is_told(service: Service) -> None:
    client = service.client(max_retries=0)
    assert {model.id for model in client.models.list()} == {CHAT, EMBED}
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=COUNT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=CHAT, messages=COUNT, max_tokens=10_000_000)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()


def test_each_engine_runs_on_the_cores_of_its_slice(service: Service) -> None:
    cores: dict[str, set[int]] = {}
    for model, entry in service.journals().items():
        shim = psutil.Process(entry["shim_pid"])
        for process in shim.children(recursive=True):
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                cores.setdefault(model, set()).update(os.sched_getaffinity(int(thread.name)))
    assert not cores[CHAT] & cores[EMBED]


def test_engines_listen_nowhere_but_on_their_socket(service: Service) -> None:
    for entry in service.journals().values():
        path = Path(entry["endpoint"].removeprefix("unix:"))
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o600
        shim = psutil.Process(entry["shim_pid"])
        for process in (shim, *shim.children(recursive=True)):
            for listening in (c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN):
                assert listening.laddr.ip in ("127.0.0.1", "::1")


def test_latency_is_shown_per_slice_and_tenant(service: Service) -> None:
    text_of(stream_chat(service.client(), max_tokens=8))
    row = until(
        lambda: next((r for r in service.slices() if "acme" in r["tenants"] and r["model"] == CHAT), None),
        seconds=5,
        what="acme in /slices",
    )
    for windows in (row["windows"], row["tenants"]["acme"]["windows"]):
        assert set(windows) == {"1m", "5m", "1h"}
        hour = windows["1h"]
        assert hour["ttft_seconds"]["count"] >= 1
        assert hour["itl_seconds"]["count"] >= 4
        assert 0 < hour["ttft_seconds"]["p50"] <= hour["e2e_seconds"]["p99"]


def test_a_client_that_leaves_stops_its_request_in_the_engine(service: Service) -> None:
    running = "vllm:num_requests_running"
    stream = stream_chat(service.client(), max_tokens=1500)
    next(iter(stream))
    until(lambda: service.metric(CHAT, running) == 1, seconds=10, what="the request running in the engine")
    stream.close()
    left = time.monotonic()
    until(lambda: service.metric(CHAT, running) == 0, seconds=5, what="the request gone from the engine")
    assert time.monotonic() - left < 1.0, "a client that left kept its slice busy"


def test_a_killed_controller_finds_its_engines_again(service: Service) -> None:
    before = service.engine_pids()
    controller = int((service.state / "controller.lock").read_text(encoding="utf-8").split()[0])
    generation = json.loads((service.state / "routing.json").read_text(encoding="utf-8"))["generation"]
    os.kill(controller, signal.SIGKILL)
    assert text_of(stream_chat(service.client(), max_tokens=8)), "the gateway needs no controller to serve"
    until(lambda: new_controller(service, controller), seconds=60, what="another controller")
    until(
        lambda: (
            json.loads((service.state / "routing.json").read_text(encoding="utf-8"))["generation"] >= generation
            and service.engine_pids() == before
        ),
        seconds=30,
        what="the engines adopted",
    )
    service.ensure_ready()
    assert service.engine_pids() == before
    assert text_of(stream_chat(service.client(), max_tokens=8))


def new_controller(service: Service, old: int) -> bool:
    text = (service.state / "controller.lock").read_text(encoding="utf-8").split()
    return bool(text) and int(text[0]) != old and psutil.pid_exists(int(text[0]))


def test_a_killed_engine_ends_its_streams_and_no_others(service: Service) -> None:
    before = service.engine_pids()
    client = service.client(max_retries=0)
    embedded: list[int] = []
    stop = threading.Event()

    def embed_all_the_while() -> None:
        while not stop.is_set():
            embedded.append(len(client.embeddings.create(model=EMBED, input="still here").data[0].embedding))

    beside = threading.Thread(target=embed_all_the_while)
    beside.start()
    try:
        events = iter(stream_chat(client, max_tokens=1500))
        next(events)
        os.kill(before[CHAT], signal.SIGKILL)
        with pytest.raises(openai.APIError) as died:
            list(events)
        assert died.value.code is not None
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=CHAT, messages=COUNT, max_tokens=4)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"]
        so_far = len(embedded)
        until(lambda: len(embedded) > so_far + 2, seconds=20, what="the other model answering on")
    finally:
        stop.set()
        beside.join(60)
    until(lambda: service.engine_pids()[CHAT] != before[CHAT], seconds=60, what="another engine for the chat model")
    service.ensure_ready()
    assert service.engine_pids()[EMBED] == before[EMBED]
    assert text_of(stream_chat(client, max_tokens=8))


def test_ctrl_c_leaves_nothing_behind(service: Service) -> None:
    everything = service.processes()
    sockets = [Path(entry["endpoint"].removeprefix("unix:")) for entry in service.journals().values()]
    assert len(everything) >= 6, "up, controller, gateway, and two shims with an engine each"
    assert service.stop() == 0, service.said()[-3000:]
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert alive == []
    assert [path for path in sockets if path.exists()] == []
