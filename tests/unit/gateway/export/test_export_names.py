from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.export.names import check_image, check_label, check_subdomain, dns_label
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


@pytest.mark.parametrize("chosen", ["fast", "fast.example.com", "a" * 63 + "." + "b" * 63])
def test_a_storage_class_may_have_dots(chosen: str) -> None:
    assert check_subdomain(chosen, "--storage-class") == chosen


@pytest.mark.parametrize("chosen", ["", "Fast", "a b", ".a", "a.", "a..b", "-a.b", ".".join(["a" * 60] * 5)])
def test_what_no_storage_class_can_be_called_is_refused(chosen: str) -> None:
    with pytest.raises(ConfigError, match="no name that Kubernetes takes"):
        check_subdomain(chosen, "--storage-class")


DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "chosen",
    [
        "sliceway-gateway",
        "sliceway-gateway:0.1.0",
        "team/sliceway_gateway:Latest-1",
        "localhost/engine",
        "localhost:5000/engine:x",
        "registry:5000/a/b/c",
        "Registry.Example.com/a/engine:1",
        f"registry.example.com:443/a/engine:1@{DIGEST}",
        f"engine@{DIGEST}",
    ],
)
def test_every_kind_of_image_name_is_taken(chosen: str) -> None:
    assert check_image(chosen, "--engine-image") == chosen


@pytest.mark.parametrize(
    "chosen",
    [
        "",
        " ",
        "my engine",
        "Engine",
        "UPPER/engine",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-x",
        "a:b:c",
        "a@sha256:12",
        "http://a/b",
    ],
)
def test_what_no_registry_has_is_refused(chosen: str) -> None:
    with pytest.raises(ConfigError, match="names no image") as refused:
        check_image(chosen, "--engine-image")
    assert refused.value.where == "--engine-image"
