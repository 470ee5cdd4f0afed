"""Files and batches through the official client, over a whole gateway; and over gateways that stop in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.digests import LatencyBook
from gateway.errors import Draining
from gateway.service import Gateway
from gateway.testing import wait_until
from placement.table import ReplicaState
from tests.integration.surface_harness import Surface, served, surface, surface_config, surface_fleet

ENDED = ("completed", "failed", "cancelled", "expired")
CHAT = "/v1/chat/completions"


def line(custom_id: str, *, url: str = CHAT, method: str = "POST", **body: Any) -> dict[str, Any]:
    wanted = {"model": "chat", "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4} | body
    return {"custom_id": custom_id, "method": method, "url": url, "body": wanted}


def jsonl(lines: list[Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


def started(client: openai.OpenAI, lines: list[Any], *, endpoint: Any = CHAT, **options: Any) -> Any:
    uploaded = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=uploaded.id, endpoint=endpoint, **{"completion_window": "24h"} | options)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    def look() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    return wait_until(look, what="the batch has ended", seconds=40)


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    return {row["custom_id"]: row for row in map(json.loads, client.files.content(file_id).text.splitlines())}


def measured(book: LatencyBook) -> int:
    """How many answers a book has the time of, since the gateway started."""
    total = 0
    for _, _, series in book.items():
        series.advance(0.0)
        total += sum(series.e2e_seconds.bucket_counts)
    return total


def books(gateway: Gateway) -> tuple[int, int]:
    """The answers measured for clients that wait, and for batches. To be asked on the gateway's own thread."""
    return measured(gateway.exchanges.book), measured(gateway.exchanges.batch_book)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    with surface(tmp_path_factory.mktemp("state")) as made:
        yield made


def test_a_batch_is_answered_by_custom_id(system: Surface) -> None:
    client, gateway = system.client(), system.gateway
    wait_until(lambda: gateway.idle, what="what came before is over and measured")
    waited_for, in_batches = gateway.on_loop(lambda: books(gateway.gateway))
    batch = ended(client, started(client, [line(f"n{i}") for i in range(20)], metadata={"for": "test"}).id)
    assert gateway.on_loop(lambda: books(gateway.gateway)) == (waited_for, in_batches + 20)
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.metadata == {"for": "test"}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    got = rows(client, batch.output_file_id)
    assert set(got) == {f"n{i}" for i in range(20)}
    for row in got.values():
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
        assert row["response"]["body"]["choices"][0]["message"]["content"] == "the quick brown fox"
        assert row["response"]["body"]["usage"]["completion_tokens"] == 4


def test_other_endpoints_have_batches_too(system: Surface) -> None:
    client = system.client()
    lines = [{"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "pool", "input": "one"}}]
    batch = ended(client, started(client, lines, endpoint="/v1/embeddings").id)
    assert len(rows(client, batch.output_file_id)["e"]["response"]["body"]["data"][0]["embedding"]) == 8


def test_what_engines_refuse_is_in_the_error_file(system: Surface) -> None:
    client = system.client()
    lines = [line("good"), line("unknown", model="never-was"), line("long", max_tokens=100_000)]
    batch = ended(client, started(client, lines).id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 2)
    assert set(rows(client, batch.output_file_id)) == {"good"}
    wrong = rows(client, batch.error_file_id)
    assert wrong["unknown"]["response"]["status_code"] == 404
    assert wrong["unknown"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert wrong["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_wrong_lines_fail_the_batch_with_their_numbers_before_anything_runs(system: Surface) -> None:
    client = system.client()
    before = system.served()
    lines = [
        line("a"),
        line("a"),
        line("b", method="GET"),
        line("c", url="/v1/completions"),
        line("d", stream=True),
        {"custom_id": "e", "method": "POST", "url": CHAT, "body": {}},
        {"custom_id": "f"},
        [1],
    ]
    uploaded = client.files.create(file=("in.jsonl", jsonl(lines) + b"{not json\n\n"), purpose="batch")
    made = client.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
    batch = ended(client, made.id)
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_method"),
        (4, "mismatched_url"),
        (5, "unsupported_parameter"),
        (6, "missing_required_parameter"),
        (7, "invalid_request"),
        (8, "invalid_request"),
        (9, "invalid_json_line"),
    ]
    assert system.served() == before


def test_files_are_kept_listed_and_removed(system: Surface) -> None:
    client = system.client("beta")
    made = [client.files.create(file=(f"{n}.jsonl", b"x" * (n + 1)), purpose="batch") for n in range(3)]
    assert [(f.filename, f.bytes, f.purpose, f.status) for f in made][1] == ("1.jsonl", 2, "batch", "processed")
    listed = [f.id for f in client.files.list(purpose="batch", order="asc", limit=2)]
    assert sorted(listed) == sorted(f.id for f in made)
    assert client.files.retrieve(made[2].id).bytes == 3
    assert client.files.content(made[2].id).read() == b"xxx"
    assert client.files.delete(made[2].id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.files.retrieve(made[2].id)
    assert gone.value.code == "not_found"


def test_tenants_see_their_own_only(system: Surface) -> None:
    acme, beta = system.client("acme"), system.client("beta")
    batch = ended(acme, started(acme, [line("x")]).id)
    for ask in (
        lambda: beta.files.retrieve(batch.input_file_id),
        lambda: beta.files.content(batch.output_file_id),
        lambda: beta.files.delete(batch.output_file_id),
        lambda: beta.batches.retrieve(batch.id),
        lambda: beta.batches.cancel(batch.id),
        lambda: beta.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert batch.id not in [b.id for b in beta.batches.list()]
    assert batch.id in [b.id for b in acme.batches.list()]
    assert system.send("GET", "/v1/files", tenant=None).status_code == 401


def test_requests_for_files_and_batches_are_checked(system: Surface) -> None:
    client = system.client()
    good = client.files.create(file=("in.jsonl", jsonl([line("x")])), purpose="batch").id
    for ask, param in (
        (lambda: client.files.create(file=("x", b"x"), purpose="assistants"), "purpose"),
        (
            lambda: client.batches.create(input_file_id=good, endpoint="/v1/messages", completion_window="24h"),
            "endpoint",
        ),  # type: ignore[arg-type]
        (
            lambda: client.batches.create(input_file_id=good, endpoint=CHAT, completion_window="30d"),
            "completion_window",
        ),  # type: ignore[arg-type]
        (lambda: client.batches.create(input_file_id="", endpoint=CHAT, completion_window="24h"), "input_file_id"),
        (lambda: client.batches.list(limit=0), "limit"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.param == param
    for body in (b"", b"[]", b"{", b'{"metadata": {"a": 1}}', b'{"endpoint": "/v1/chat/completions"}'):
        answer = system.send("POST", "/v1/batches", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert system.send("POST", "/v1/batches", content=b" " * 70_000).status_code == 413
    done = ended(client, started(client, [line("x")]).id)
    with pytest.raises(openai.ConflictError) as ended_already:
        client.batches.cancel(done.id)
    assert ended_already.value.code == "batch_not_open"


def test_uploads_are_bounded_and_leave_nothing(tmp_path: Path) -> None:
    with surface(tmp_path, batches={"max_file": "1000B", "max_kept_per_tenant": "1500B"}) as system:
        client = system.client()
        client.files.create(file=("a", b"x" * 1000), purpose="batch")
        for size, code in ((1001, "body_too_large"), (100_000, "body_too_large"), (600, "storage_full")):
            with pytest.raises(openai.APIStatusError) as caught:
                client.files.create(file=("b", b"x" * size), purpose="batch")
            assert (caught.value.status_code, caught.value.code) == (413, code)
        assert len(list((tmp_path / "files").iterdir())) == 1


def test_a_cancelled_batch_keeps_what_it_has(tmp_path: Path) -> None:
    with surface(tmp_path, chat={"ttft_seconds": 0.2}) as system:
        client = system.client()
        batch = started(client, [line(f"n{i}") for i in range(400)])
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed, what="some are answered")
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = ended(client, batch.id)
        assert batch.status == "cancelled"
        answered, given_up = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
        assert len(answered) + len(given_up) == 400
        assert answered
        assert {row["error"]["code"] for row in given_up.values()} == {"batch_cancelled"}


def test_a_batch_goes_on_in_the_next_gateway_and_runs_nothing_twice(tmp_path: Path) -> None:
    """A gateway ends in the middle: what was answered is kept, what was under way is asked again, and nothing else."""
    config = surface_config(tmp_path, batches={"max_concurrent": 4})
    with surface_fleet(tmp_path, {"ttft_seconds": 0.02}) as fleet:
        with served(config, fleet) as first:
            client = first.client()
            batch = started(client, [line(f"n{i}") for i in range(60)])
            wait_until(
                lambda: client.batches.retrieve(batch.id).request_counts.completed >= 10, what="ten are answered"
            )
        with served(config, fleet) as second:
            client = second.client()
            batch = ended(client, batch.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 60)
            answers = client.files.content(batch.output_file_id).text.splitlines()
            assert sorted(json.loads(a)["custom_id"] for a in answers) == sorted(f"n{i}" for i in range(60))
            asked = sum(fleet.engines[name].state.started for name in ("chat-0", "chat-1"))
            assert 60 <= asked <= 60 + 4


def test_a_batch_waits_for_engines_that_are_not_there(tmp_path: Path) -> None:
    with surface(tmp_path) as system:
        for name in ("chat-0", "chat-1"):
            system.fleet.mark(name, ReplicaState.STARTING)
        system.gateway.look()
        client = system.client()
        batch = started(client, [line("n")])
        wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", what="it has begun")
        assert client.batches.retrieve(batch.id).request_counts.failed == 0
        system.fleet.mark("chat-0", ReplicaState.READY)
        assert ended(client, batch.id).request_counts.completed == 1


def test_batches_leave_room_for_others(tmp_path: Path) -> None:
    """Of 16 sequences per engine a quarter stays free, whatever the batches want."""
    with surface(tmp_path, chat={"ttft_seconds": 600.0}, batches={"max_concurrent": 64}) as system:
        batch = started(system.client(), [line(f"n{i}") for i in range(64)])
        engines = [system.fleet.engines[name] for name in ("chat-0", "chat-1")]
        wait_until(lambda: sum(e.state.running for e in engines) >= 24, what="batches run")
        assert [e.state.running for e in engines] == [12, 12]
        assert system.client().batches.cancel(batch.id).status == "cancelling"
        exchanges, over = system.gateway.gateway.exchanges, Draining("The test is over.", retry_after_seconds=1.0)

        def ended_early() -> Any:
            """End what would take ten minutes, also what was begun before the runner heard of the cancellation."""
            system.gateway.on_loop(lambda: exchanges.interrupt_all(over))
            now = system.client().batches.retrieve(batch.id)
            return now if now.status in ENDED else None

        assert wait_until(ended_early, what="the batch has ended", seconds=40).status == "cancelled"
