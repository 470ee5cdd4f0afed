"""What a gateway is asked before a load: slices, contexts, and how many tokens a prompt has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadtests.lengths import Choice
from loadtests.problems import LoadTestError, ScenarioError
from loadtests.scenario import TenantLoad
from loadtests.target import Target

SLICES = [{"model": "chat", "replica": "chat-0", "slice": {"id": "cpu-0"}}]
MODELS = {"data": [{"id": "chat", "max_model_len": 4096}, {"id": "other"}]}
CHAT = TenantLoad.model_validate({"name": "acme", "model": "chat", "prompt_tokens": 50})


@contextmanager
def gateway(answers: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Answers by path: a value, or a function of the request's body; 404 for the rest. Gives its address and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: Any) -> None:
            asked.append(self.path)
            found = answers.get(self.path)
            data = json.dumps(found(body) if callable(found) else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def words(body: Any) -> int:
    return len(body["messages"][0]["content"].split()) + 9


def test_slices_and_contexts_are_read() -> None:
    with gateway({"/slices": SLICES, "/v1/models": MODELS}) as (url, _):
        target = Target(url, {"acme": None})
        assert target.places().by_replica == {"chat-0": "cpu-0"}
        assert target.max_model_len("chat", "acme") == 4096
        assert target.max_model_len("other", "acme") is None
        assert target.max_model_len("absent", "acme") is None


def test_tokens_are_counted_by_the_tokenizer_that_the_server_offers() -> None:
    with gateway({"/tokenize": lambda body: {"count": words(body)}}) as (url, asked):
        lexicon = Target(url, {"acme": "sk-1"}).lexicons([CHAT], {})["acme"]
    assert (lexicon.exact, lexicon.overhead_tokens) == (True, 10)
    assert "/tokenize" in lexicon.source
    assert set(asked) == {"/tokenize"}


def test_else_by_the_usage_of_one_token_requests() -> None:
    usage = {"/v1/chat/completions": lambda body: {"usage": {"prompt_tokens": words(body)}}}
    with gateway(usage) as (url, asked):
        target = Target(url, {"acme": None})
        lexicon = target.lexicons([CHAT], {})["acme"]
        assert "usage" in lexicon.source
        before = len(asked)
        assert target.lexicons([CHAT], {})["acme"] is lexicon
        assert len(asked) == before
    assert (lexicon.exact, lexicon.overhead_tokens) == (True, 10)


def test_else_by_a_tokenizer_file_and_what_the_server_adds(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from loadtests.tokens import ANCHOR, CANDIDATES

    vocabulary = {word: i for i, word in enumerate(("[UNK]", ANCHOR, *CANDIDATES))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    usage = {"/v1/chat/completions": lambda body: {"usage": {"prompt_tokens": words(body)}}}
    with gateway(usage) as (url, asked):
        lexicon = Target(url, {"acme": None}).lexicons([CHAT], {"chat": tmp_path / "tokenizer.json"})["acme"]
        assert (lexicon.exact, lexicon.overhead_tokens) == (True, 10)
        assert len(asked) == 1
        (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
        with pytest.raises(ScenarioError, match="no tokenizer can be read"):
            Target(url, {"acme": None}).lexicons([CHAT], {"chat": tmp_path / "broken.json"})


def test_a_prompt_shorter_than_the_template_is_refused() -> None:
    short = TenantLoad.model_validate({"name": "acme", "model": "chat", "prompt_tokens": 10})
    with gateway({"/tokenize": lambda body: {"count": words(body)}}) as (url, _):
        with pytest.raises(ScenarioError, match="prompts of 10 tokens cannot be made") as caught:
            Target(url, {"acme": None}).lexicons([short], {})
        assert "Ask for 11 or more" in str(caught.value)
        mixed = short.model_copy(update={"prompt_tokens": Choice(values=(5, 11))})
        assert Target(url, {"acme": None}).lexicons([mixed], {})


def test_a_model_that_does_not_count_is_told() -> None:
    with gateway({}) as (url, _), pytest.raises(LoadTestError, match="does not tell how many tokens"):
        Target(url, {"acme": None}).lexicons([CHAT], {})


def test_nobody_there_is_told() -> None:
    with pytest.raises(ScenarioError, match="nobody answers") as caught:
        Target("http://127.0.0.1:9", {"acme": None}).slices()
    assert "sliceway up" in str(caught.value)
