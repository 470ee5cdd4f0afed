"""Whose turn it is: laws over made-up fleets, walked to their ends."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from placement.rolling import Standing, next_turn, stopped_models


def old(name: str, *, serves: bool = True) -> Standing:
    return Standing(name, name.rpartition("-")[0], outdated=True, serves=serves)


def new(name: str, *, serves: bool = True, failed: bool = False) -> Standing:
    return Standing(name, name.rpartition("-")[0], outdated=False, serves=serves, failed=failed)


def test_one_after_another_and_nothing_where_all_is_new() -> None:
    assert next_turn([new("chat-0"), new("chat-1")]) is None
    assert next_turn([old("chat-10"), old("chat-2")]) == "chat-2"
    assert next_turn([new("chat-2", serves=False), old("chat-10")], "chat-2") == "chat-2"
    assert next_turn([new("chat-2"), old("chat-10")], "chat-2") == "chat-10"


def test_what_does_not_serve_goes_first_and_what_starts_anyway_is_waited_for() -> None:
    assert next_turn([old("chat-0"), old("chat-1", serves=False)]) == "chat-1"
    assert next_turn([old("chat-0"), new("chat-1", serves=False)]) is None
    assert next_turn([old("chat-0"), new("embed-0", serves=False)]) == "chat-0", "another model's start is no reason"


def test_a_replacement_that_fails_keeps_the_others_as_they_are() -> None:
    standings = [new("chat-0", serves=False, failed=True), old("chat-1"), old("embed-0")]
    assert stopped_models(standings) == {"chat"}
    assert next_turn(standings, "chat-0") == "embed-0"
    assert next_turn([*standings[:2], new("embed-0")], "embed-0") is None
    assert stopped_models([new("chat-0", serves=False, failed=True)]) == frozenset(), "nothing of it is older"


def test_a_replica_that_is_gone_loses_its_turn() -> None:
    assert next_turn([old("chat-1")], "chat-0") == "chat-1"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.booleans()), max_size=12), st.integers(0, 99))
def test_all_are_replaced_and_never_two_are_away_for_it(fleet: list[tuple[str, bool, bool]], seed: int) -> None:
    """Whatever serves at first: of a model, at most one replica that served is away at any moment, and all end up new."""
    chance = Random(seed)
    states = {f"{m}-{i}": Standing(f"{m}-{i}", m, outdated, serves) for i, (m, outdated, serves) in enumerate(fleet)}
    away: set[str] = set()
    turn = None
    for _ in range(20 * len(states) + 20):
        shuffled = list(states.values())
        chance.shuffle(shuffled)
        turn = next_turn(shuffled, turn)
        if turn is not None and states[turn].outdated:
            if states[turn].serves:
                assert not away, "the one before serves again"
                away.add(turn)
            states[turn] = replace(states[turn], outdated=False, serves=False)
        starting = [name for name, one in states.items() if one.under_way]
        if starting:
            name = chance.choice(starting)
            states[name] = replace(states[name], serves=True)
            away.discard(name)
    assert not any(one.outdated or one.under_way for one in states.values())
