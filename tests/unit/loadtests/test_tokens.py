"""Prompts have the length that was asked for, by whatever tokenizer the model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from loadtests.bodies import Bodies
from loadtests.lengths import Choice, Exponential, Fixed, Lognormal, Normal, Uniform
from loadtests.scenario import TenantLoad
from loadtests.tokens import CANDIDATES, Lexicon, calibrate
from loadtests.traces import Row

LONG = {"business", "question", "research", "government", "student"}


def counting(template: int = 0, long_words: set[str] = LONG) -> tuple[Callable[[str], int], list[str]]:
    """A tokenizer for which some words are two tokens, and the texts that it was asked about."""
    asked: list[str] = []

    def count(text: str) -> int:
        asked.append(text)
        return template + sum(2 if word in long_words else 1 for word in text.split())

    return count, asked


@pytest.mark.parametrize("template", [0, 1, 27])
def test_words_of_one_token_are_found_with_few_questions(template: int) -> None:
    count, asked = counting(template)
    lexicon = calibrate(count, "test")
    assert lexicon.exact
    assert lexicon.overhead_tokens == template + 1
    assert not LONG & set(lexicon.words)
    assert len(lexicon.words) >= len(CANDIDATES) // 2
    assert len(asked) < 50


def test_where_hardly_a_word_is_one_token_the_mean_is_used() -> None:
    count, _ = counting(3, set(CANDIDATES))
    lexicon = calibrate(count, "test")
    assert not lexicon.exact
    assert lexicon.tokens_per_word == pytest.approx(2.0)
    assert lexicon.words_for(104) == 50


def tenant(**fields: Any) -> TenantLoad:
    return TenantLoad.model_validate({"name": "acme", "model": "chat"} | fields)


def prompts_of(load: TenantLoad, lexicon: Lexicon, count: int = 50, row: Row | None = None) -> list[str]:
    bodies = Bodies(load, seed=3, lexicon=lexicon)
    return [json.loads(bodies.make(Random(i), row).body)["messages"][-1]["content"] for i in range(count)]


def test_prompts_have_exactly_so_many_tokens() -> None:
    count, _ = counting(5)
    lexicon = calibrate(count, "test")
    for wanted in (7, 40, 333):
        assert {count(text) for text in prompts_of(tenant(prompt_tokens=wanted), lexicon)} == {wanted}


def test_shared_prefixes_are_shared_and_the_rest_is_not() -> None:
    lexicon = calibrate(counting()[0], "test")
    load = tenant(prompt_tokens=60, shared_prefix={"tokens": 30, "groups": 2})
    texts = prompts_of(load, lexicon)
    assert len({tuple(text.split()[:31]) for text in texts}) == 2
    assert len(set(texts)) == len(texts)
    assert {len(text.split()) for text in texts} == {60}


def test_another_wording_has_the_same_lengths_and_no_prompt_of_the_first() -> None:
    lexicon = calibrate(counting()[0], "test")
    lengths = {
        "prompt_tokens": {"kind": "uniform", "min": 40, "max": 90},
        "output_tokens": {"kind": "uniform", "min": 1, "max": 99},
    }
    load = tenant(shared_prefix={"tokens": 30, "groups": 2}, **lengths)

    def asked(wording: int) -> list[dict[str, Any]]:
        bodies = Bodies(load, seed=3, wording=wording, lexicon=lexicon)
        return [json.loads(bodies.make(Random(i)).body) for i in range(50)]

    def texts(bodies: list[dict[str, Any]]) -> list[list[str]]:
        return [body["messages"][-1]["content"].split() for body in bodies]

    one, other = asked(1), asked(2)
    assert one == asked(1)
    assert [body["max_tokens"] for body in one] == [body["max_tokens"] for body in other]
    assert list(map(len, texts(one))) == list(map(len, texts(other)))
    assert {tuple(words[:8]) for words in texts(one)}.isdisjoint(tuple(words[:8]) for words in texts(other))
    assert len({tuple(words[:31]) for words in texts(other)}) == 2


def test_a_trace_decides_lengths_and_prefixes() -> None:
    lexicon = calibrate(counting()[0], "test")
    texts = prompts_of(tenant(), lexicon, row=Row(0.0, 20, 4, prefix="sys", prefix_tokens=12))
    assert {len(text.split()) for text in texts} == {20}
    assert len({tuple(text.split()[:13]) for text in texts}) == 1
    assert len(set(texts)) == len(texts)


def test_tokens_without_a_lexicon_are_refused() -> None:
    with pytest.raises(ValueError, match="lexicon"):
        Bodies(tenant(prompt_tokens=5), seed=1)


def test_tools_embeddings_and_history_are_in_the_body() -> None:
    tools = json.loads(Bodies(tenant(tools={"count": 3, "choice": "none"}), seed=1).make(Random(1)).body)
    assert [tool["function"]["name"] for tool in tools["tools"]] == ["look_up_0", "look_up_1", "look_up_2"]
    assert tools["tool_choice"] == "none"
    many = json.loads(Bodies(tenant(task="embedding", inputs=4), seed=1).make(Random(1)).body)
    assert len(many["input"]) == 4
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turn = json.loads(Bodies(tenant(), seed=1).make(Random(1), history=said).body)
    assert [m["role"] for m in turn["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("length", "low", "high", "median"),
    [
        (Fixed(value=9), 9, 9, 9),
        (Uniform(min=10, max=20), 10, 20, 15),
        (Normal(mean=100, std=30, min=50, max=150), 50, 150, 100),
        (Lognormal(median=300, p95=1800, max=8000), 1, 8000, 300),
        (Exponential(mean=100, max=1000), 1, 1000, 69),
        (Choice(values=(5, 500), weights=(9, 1)), 5, 500, 5),
    ],
)
def test_lengths_stay_in_bounds_around_their_median(length: Any, low: int, high: int, median: int) -> None:
    random = Random(1)
    drawn = sorted(length.draw(random) for _ in range(4000))
    assert low <= drawn[0]
    assert drawn[-1] <= high
    assert drawn[2000] == pytest.approx(median, rel=0.08)


def test_lognormal_has_its_95th_percentile() -> None:
    random, length = Random(1), Lognormal(median=300, p95=1800, max=100_000)
    assert sorted(length.draw(random) for _ in range(8000))[7600] == pytest.approx(1800, rel=0.1)
