from __future__ import annotations

import pytest

from model_registry.words import are, counted, sentences


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 replicas are"), (1, "1 replica is"), (2, "2 replicas are"), (12000, "12,000 replicas are")],
)
def test_a_count_its_noun_and_its_verb_agree(count: int, said: str) -> None:
    assert f"{counted(count, 'replica')} {are(count)}" == said


def test_a_plural_that_no_s_makes_is_given() -> None:
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("there is no slice at all", "See `sliceway slices`."), "there is no slice at all. See `sliceway slices`."),
        (("Is it there?", "Look."), "Is it there? Look."),
        (("nothing more to say", None), "nothing more to say"),
        (("told in\n  two lines.", "", "Yes."), "told in two lines. Yes."),
        ((None, " "), ""),
    ],
)
def test_what_stands_in_one_line_are_sentences(parts: tuple[str | None, ...], said: str) -> None:
    assert sentences(*parts) == said
