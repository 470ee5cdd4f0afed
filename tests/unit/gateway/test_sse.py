from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import EngineError
from gateway.sse import MAX_EVENT_BYTES, StreamMeter, Usage, usage_of_body


class Account:
    """What a meter told."""

    def __init__(self, *, keep_usage: bool = False, single: bool = True) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.meter = StreamMeter(
            keep_usage=keep_usage,
            first=self.first.append,
            gap=(lambda gap, _: self.gaps.append(gap)) if single else None,
        )

    def feed(self, *arrivals: tuple[float, bytes]) -> bytes:
        return b"".join(self.meter.feed(data, now) for now, data in arrivals)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, finish: str | None = None, **more: Any) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "delta": {"content": text} | more, "finish_reason": finish}]})


ROLE = event(
    {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
)
FINISH = event({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
USAGE = event({"id": "x", "choices": [], "usage": {"prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3}})
DONE = b"data: [DONE]\n\n"


def test_the_role_alone_is_no_first_token() -> None:
    account = Account()
    account.feed((1.0, ROLE), (3.0, token("a")), (4.0, token("b")), (6.0, token("c")))
    assert account.first == [3.0]
    assert account.gaps == [1.0, 2.0]
    assert account.meter.events == 3


def test_a_role_with_its_first_token_in_one_read_is() -> None:
    account = Account()
    account.feed((2.0, ROLE + token("a")), (3.0, token("b")))
    assert (account.first, account.gaps) == ([2.0], [1.0])


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
        {"refusal": "no"},
        {"role": "assistant", "content": "a"},
    ],
)
def test_reasoning_tools_and_refusals_are_content(delta: dict[str, Any]) -> None:
    account = Account()
    account.feed((1.0, ROLE), (2.0, event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})))
    assert account.first == [2.0]


def test_completions_text_is_content() -> None:
    account = Account()
    account.feed((1.0, event({"choices": [{"index": 0, "text": "a", "finish_reason": None}]})))
    assert account.first == [1.0]


def test_tokens_that_arrive_together_are_one_arrival() -> None:
    account = Account()
    account.feed((1.0, token("a")), (2.0, token("b") + token("c") + token("d")), (3.0, token("e")))
    assert account.gaps == [1.0, 1.0]
    assert account.meter.events == 5


def test_what_only_ends_the_stream_is_no_arrival() -> None:
    account = Account()
    account.feed((1.0, token("a")), (2.0, token("b")), (50.0, FINISH), (60.0, USAGE), (70.0, DONE))
    assert account.gaps == [1.0]
    assert account.meter.events == 2
    assert account.meter.done


def test_the_last_token_counts_though_it_comes_with_the_end() -> None:
    account = Account()
    account.feed((1.0, token("a")), (3.0, token("b", "length") + USAGE + DONE))
    assert account.gaps == [2.0]
    assert account.meter.events == 2


def test_keep_alive_comments_pass_and_count_as_nothing() -> None:
    account = Account()
    passed = account.feed((1.0, b": keep-alive\n\n"), (2.0, token("a")), (3.0, b": keep-alive\n\n"), (4.0, token("b")))
    assert passed.count(b": keep-alive\n\n") == 2
    assert (account.first, account.gaps) == ([2.0], [2.0])


def test_several_choices_have_no_gaps_between_tokens() -> None:
    account = Account(single=False)
    account.feed((1.0, token("a")), (2.0, token("b")))
    assert account.gaps == []
    assert account.meter.events == 2


@pytest.mark.parametrize("keep", [True, False])
def test_usage_is_read_and_kept_only_for_who_asked(keep: bool) -> None:
    account = Account(keep_usage=keep)
    passed = account.feed((1.0, token("a")), (2.0, FINISH + USAGE + DONE))
    assert account.meter.usage == Usage(9, 3)
    assert (USAGE in passed) == keep
    assert passed == token("a") + FINISH + (USAGE if keep else b"") + DONE


def test_usage_on_every_chunk_passes_for_who_asked_for_it() -> None:
    with_usage = event(
        {
            "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1},
        }
    )
    account = Account(keep_usage=True)
    assert account.feed((1.0, with_usage), (2.0, with_usage)) == with_usage * 2
    assert not account.meter.ended


@pytest.mark.parametrize(
    "text",
    [
        '"finish_reason":null',
        "data: [DONE]",
        'data: {"error": {"message": "x"}}',
        '"choices":[]',
        "\n\ndata: [DONE]\n\n",
        'data: "finish_reason":null',
    ],
)
def test_text_that_looks_like_the_protocol_is_text(text: str) -> None:
    account = Account()
    said = token(text)
    assert account.feed((1.0, token("a")), (2.0, said), (3.0, said + said)) == token("a") + said * 3
    assert account.gaps == [1.0, 1.0]
    assert account.meter.events == 4
    assert not account.meter.done
    assert account.meter.error is None


def test_an_error_event_is_reworded_and_remembered() -> None:
    account = Account()
    passed = account.feed(
        (1.0, token("a")),
        (2.0, event({"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}})),
    )
    error = json.loads(passed.split(b"data: ")[-1])["error"]
    assert error == {"message": "boom", "type": "server_error", "param": None, "code": "engine_error"}
    assert account.meter.error is not None
    assert not account.meter.ended


@pytest.mark.parametrize(
    "junk",
    [b"data: not json\n\n", b"event: ping\n\n", b"data: 7\n\n", b"id: 1\nretry: 5\n\n", b"\n\n", b"data: []\n\n"],
)
def test_events_that_mean_nothing_here_pass_unchanged(junk: bytes) -> None:
    account = Account()
    assert account.feed((1.0, token("a")), (2.0, junk), (3.0, token("b"))) == token("a") + junk + token("b")
    assert account.gaps == [2.0]


def test_half_an_event_is_held_until_it_is_whole() -> None:
    account = Account()
    said = token("a")
    assert account.feed((1.0, said[:10])) == b""
    assert account.feed((2.0, said[10:])) == said
    assert account.first == [2.0]


def test_an_event_without_end_is_an_error_and_not_memory() -> None:
    meter = Account().meter
    assert meter.feed(b"x" * MAX_EVENT_BYTES, 1.0) == b""
    with pytest.raises(EngineError, match="event of more than"):
        meter.feed(b"x", 2.0)


@pytest.mark.parametrize(
    ("end", "ended"),
    [((FINISH,), True), ((USAGE,), True), ((), False), ((DONE,), False)],
    ids=["finish", "usage", "neither", "done alone"],
)
def test_a_stream_has_ended_when_its_only_choice_has_or_its_usage_came(end: tuple[bytes, ...], ended: bool) -> None:
    account = Account()
    account.feed((1.0, token("a")), *((2.0, data) for data in end))
    assert account.meter.ended == ended


def test_one_finished_choice_of_several_is_no_end() -> None:
    account = Account(single=False)
    account.feed((1.0, token("a")), (2.0, FINISH))
    assert not account.meter.ended
    account.feed((3.0, USAGE))
    assert account.meter.ended


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (
            {
                "choices": [],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 1}},
            },
            Usage(3, 4),
        ),
        ({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(3, 0)),
        (
            {
                "choices": [{"text": '"usage": {"prompt_tokens": 99}'}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4},
                "more": {"a": 1},
            },
            Usage(3, 4),
        ),
        ({"choices": [{"text": '"usage": {"prompt_tokens": 99}'}]}, None),
        ({"usage": None}, None),
        ({"usage": {"prompt_tokens": "three"}}, None),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_usage_is_found_in_whole_answers(body: Any, usage: Usage | None, indent: int | None) -> None:
    assert usage_of_body(json.dumps(body, indent=indent).encode()) == usage


def test_a_tail_that_begins_in_the_middle_of_a_character_is_read() -> None:
    whole = json.dumps({"text": "ä" * 50, "usage": {"prompt_tokens": 1}}, ensure_ascii=False).encode()
    assert usage_of_body(whole[12:]) == Usage(1, 0)
    assert usage_of_body(whole[:-4]) is None


def test_what_a_cache_had_of_a_prompt_counts_as_prompt() -> None:
    """As vLLM 0.32.0 tells it on /v1/messages with --enable-prompt-tokens-details."""
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 200, "cache_read_input_tokens": 56, "output_tokens": 8}
    assert usage_of_body(json.dumps({"usage": usage}).encode()) == Usage(257, 8)
