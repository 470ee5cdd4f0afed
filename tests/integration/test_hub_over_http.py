"""Hub ids through the real huggingface_hub, against a hub on loopback that counts what is asked of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model_registry.errors import ModelNotFound, ModelUnreadable
from model_registry.source import resolve_source
from model_registry.testing import TINY_LLAMA, write_model

pytestmark = pytest.mark.integration
COMMIT = "a" * 40


class LoopbackHub(ThreadingHTTPServer):
    """Serves `repos` (id -> directory) as the hub does: model info, files by HEAD, GET and range."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.refusals: dict[str, tuple[int, str]] = {}
        self.downloads: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("authorization"))
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        else:
            repo, _, rest = path.strip("/").partition("/resolve/")
            self._file(repo, rest.partition("/")[2])

    def _info(self, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        if repo in self.server.refusals:
            return self._refuse(*self.server.refusals[repo])
        if repo not in self.server.repos:
            return self._refuse(404, "RepoNotFound")
        if revision not in ("", "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = sorted(f for f in self.server.repos[repo].rglob("*") if f.is_file())
        siblings = [{"rfilename": str(f.relative_to(self.server.repos[repo])), "size": f.stat().st_size} for f in files]
        return self._send(
            json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode(), "application/json"
        )

    def _file(self, repo: str, name: str) -> None:
        file = self.server.repos.get(repo, Path("/nowhere")) / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.downloads.append(f"{name} {self.headers.get('range', 'whole')}")
        return self._send(file.read_bytes(), "application/octet-stream")

    def _send(self, body: bytes, kind: str) -> None:
        wanted = self.headers.get("range", "").removeprefix("bytes=")
        self.send_response(206 if wanted else 200)
        self.send_header("etag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        if wanted:
            start, end = wanted.split("-")
            self.send_header("content-range", f"bytes {start}-{end}/{len(body)}")
            body = body[int(start) : int(end) + 1]
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("x-error-code", code)
        self.send_header("x-error-message", code)
        self.send_header("content-length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    server = LoopbackHub(
        {"org/name": write_model(tmp_path / "repo", shards=2, tokenizer_config__json={"chat_template": "x"})}
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def environ(tmp_path: Path, hub: LoopbackHub) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HOME": str(tmp_path)}


def test_metadata_is_fetched_once_and_weights_never(hub: LoopbackHub, environ: dict[str, str]):
    spec = resolve_source("org/name", environ=environ)
    assert (spec.architecture, spec.path, spec.has_chat_template) == ("LlamaForCausalLM", None, True)
    assert spec.tensors is not None
    assert (spec.tensors.bytes_by_dtype, spec.tensors.exact) == ({"BF16": 4000}, True)
    assert not [d for d in hub.downloads if ".safetensors whole" in d]
    assert hub.tokens == {None}


def test_what_was_fetched_serves_without_a_network(hub: LoopbackHub, environ: dict[str, str]):
    resolve_source("org/name", environ=environ)
    asked = len(hub.downloads)
    spec = resolve_source("org/name", environ=environ | {"HF_HUB_OFFLINE": "1"})
    assert spec.tensors is not None
    assert (spec.tensors.total_bytes, spec.tensors.exact) == (4000, False)
    assert len(hub.downloads) == asked
    unreachable = resolve_source("org/name", environ=environ | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert unreachable.tensors == spec.tensors


def test_a_complete_copy_in_the_cache_asks_nobody(hub: LoopbackHub, environ: dict[str, str], tmp_path: Path):
    resolve_source("org/name", environ=environ)
    [snapshot] = (tmp_path / "hf" / "hub").glob("models--org--name/snapshots/*")
    for file in (tmp_path / "repo").glob("*.safetensors"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    hub.downloads.clear()
    for revision in (None, "main", COMMIT):
        assert resolve_source("org/name", revision=revision, environ=environ).path == snapshot
    assert hub.downloads == []


def test_the_token_travels_and_a_saved_one_is_found(hub: LoopbackHub, environ: dict[str, str], tmp_path: Path):
    resolve_source("org/name", environ=environ | {"HF_TOKEN": "hf_given"})
    assert hub.tokens == {"Bearer hf_given"}
    hub.tokens.clear()
    (tmp_path / "hf" / "token").write_text("hf_saved\n", encoding="utf-8")
    resolve_source("org/name", environ=environ)
    assert hub.tokens == {"Bearer hf_saved"}


@pytest.mark.parametrize(
    ("repo", "revision", "refusal", "message"),
    [
        (
            "org/absent",
            None,
            None,
            "the hub has no model 'org/absent', or it is private\nCheck the spelling. Set HF_TOKEN",
        ),
        ("org/gated", None, (403, "GatedRepo"), "'org/gated' is gated\nAccept its terms"),
        ("org/name", "v9", None, "has no revision 'v9'"),
        ("org/broken", None, (500, "Oops"), "the hub cannot be reached"),
    ],
)
def test_refusals_say_what_to_do(
    hub: LoopbackHub,
    environ: dict[str, str],
    repo: str,
    revision: str | None,
    refusal: tuple[int, str] | None,
    message: str,
):
    if refusal:
        hub.refusals[repo] = refusal
    with pytest.raises(ModelNotFound) as caught:
        resolve_source(repo, revision=revision, environ=environ)
    assert message in str(caught.value)


def test_offline_without_a_copy_names_both_ways(environ: dict[str, str]):
    with pytest.raises(ModelNotFound, match=r"HF_HUB_OFFLINE forbids[\s\S]*sliceway models import FILE.gguf"):
        resolve_source("org/name", environ=environ | {"HF_HUB_OFFLINE": "true"})


def test_no_network_at_all_names_both_ways(environ: dict[str, str]):
    with pytest.raises(ModelNotFound, match=r"cannot be reached: [\s\S]*sliceway models import FILE.gguf"):
        resolve_source("org/name", environ=environ | {"HF_ENDPOINT": "http://127.0.0.1:9"})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("q4.gguf", "holds GGUF files only"),
        ("adapter_config.json", "a LoRA adapter"),
        ("readme.md", "no model that an engine can load"),
    ],
)
def test_repositories_that_hold_no_servable_model(
    hub: LoopbackHub, environ: dict[str, str], tmp_path: Path, file: str, message: str
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text("x", encoding="utf-8")
    hub.repos["org/other"] = tmp_path / "other"
    with pytest.raises(ModelUnreadable, match=message):
        resolve_source("org/other", environ=environ)


def test_pickled_weights_are_an_estimate(hub: LoopbackHub, environ: dict[str, str], tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"x" * 99)
    hub.repos["org/old"] = tmp_path / "old"
    spec = resolve_source("org/old", environ=environ)
    assert spec.tensors is not None
    assert (spec.tensors.total_bytes, spec.tensors.exact) == (99, False)
