from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.export.names import check_label, dns_label
from model_registry.errors import ConfigError

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MODEL_NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}\Z")


def test_what_is_a_label_already_stays_itself() -> None:
    assert dns_label("chat-0") == "chat-0"


@pytest.mark.parametrize("name", ["org/Chat.v2-0", "Chat", "7b", "chat@acme-0", "-", "x" * 64])
def test_what_is_none_is_told_apart_by_a_hash(name: str) -> None:
    label = dns_label(name)
    assert LABEL.fullmatch(label)
    assert re.search(r"-[0-9a-f]{6}$", label)
    assert label != dns_label(name + "x")


@given(MODEL_NAMES, st.integers(17, 63))
def test_every_name_becomes_a_label_that_is_short_enough(name: str, longest: int) -> None:
    label = dns_label(name, longest=longest)
    assert LABEL.fullmatch(label)
    assert len(label) <= longest
    assert dns_label(label, longest=longest) == label


@given(MODEL_NAMES, MODEL_NAMES)
def test_two_names_never_share_a_label(one: str, other: str) -> None:
    assert (dns_label(one) == dns_label(other)) == (one == other)


@pytest.mark.parametrize("chosen", ["", "Prod", "a_b", "-a", "a-", "a" * 64, "a.b"])
def test_a_name_that_the_operator_chose_is_refused_rather_than_changed(chosen: str) -> None:
    with pytest.raises(ConfigError, match="no name that Kubernetes takes") as caught:
        check_label(chosen, "--namespace")
    assert caught.value.where == "--namespace"
