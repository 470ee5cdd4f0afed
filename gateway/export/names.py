"""Names that Kubernetes takes, out of names that sliceway takes.

A model may be called `org/Chat.v2`; a Service may not (RFC 1123: lower-case letters, digits and dashes, at most 63 of
them). What has to be changed gets a few digits of a hash, so that two names never become one by accident.
"""

from __future__ import annotations

import hashlib
import re

from model_registry.errors import ConfigError

MAX_LABEL = 63
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_HASH_DIGITS = 6
MAX_SUBDOMAIN = 253
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(?:\.{_LABEL.pattern})*")
# As container registries read it (github.com/distribution/reference, reference.go): a host only with a dot, a port or as `localhost`.
_HOST = r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9.-]+(?=:[0-9]))(?::[0-9]+)?/"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:{_HOST})?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)


def dns_label(name: str, *, longest: int = MAX_LABEL) -> str:
    """`name` itself where it is a DNS label of at most `longest` characters; else the nearest one, with a hash of `name`.

    Different names give different labels (up to a collision of 24 bits). `longest` must be above 16. A Service's name must begin with a letter,
    so a label that would begin with a digit gets `m-` in front.
    """
    if _LABEL.fullmatch(name) and name[0].isalpha() and len(name) <= longest:
        return name
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not stem or not stem[0].isalpha():
        stem = f"m-{stem}".rstrip("-")
    digits = hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]
    return f"{stem[: longest - _HASH_DIGITS - 1].rstrip('-')}-{digits}"


def check_label(value: str, option: str) -> str:
    """`value`, which the operator chose as it is. Raises ConfigError where it is no DNS label."""
    rule = "Lower-case letters, digits and dashes, at most 63 of them; the first and the last is no dash."
    return _checked(value, _LABEL, MAX_LABEL, option, rule)


def check_subdomain(value: str, option: str) -> str:
    """`value`, which the operator chose as it is. Raises ConfigError where it is no DNS subdomain: labels with dots between them."""
    rule = f"Lower-case letters, digits, dashes and dots, at most {MAX_SUBDOMAIN} of them, like fast.example.com."
    return _checked(value, _SUBDOMAIN, MAX_SUBDOMAIN, option, rule)


def _checked(value: str, pattern: re.Pattern[str], longest: int, option: str, rule: str) -> str:
    if pattern.fullmatch(value) and len(value) <= longest:
        return value
    raise ConfigError(f"{value!r} is no name that Kubernetes takes", where=option, remedy=rule)


def check_image(value: str, option: str) -> str:
    """`value`, which the operator chose as it is. Raises ConfigError where no registry has an image under it."""
    if _IMAGE.fullmatch(value):
        return value
    raise ConfigError(
        f"{value!r} names no image",
        where=option,
        remedy="Write [HOST[:PORT]/]NAME[:TAG] in lower-case letters, like registry.example.com/team/sliceway-gateway:0.1.0.",
    )
