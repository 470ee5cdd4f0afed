"""What operators decided at run time, over the configuration: tenants added or changed, replicas taken out.

One small file in the state directory, replaced atomically and followed by every gateway, so that a decision counts in all of
them within a second and outlives them. It is checked against the configuration before it is written; the configuration's
file itself is never changed.

::

    STATE/operator.json   {"version": 1, "tenants": {"acme": {"weight": 2}}, "drained": ["chat@0"], "reloads": 3}
    STATE/operator.lock   held (flock) while it changes
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError

from gateway.config import Config, TenantConfig
from gateway.errors import OperatorError, OverlayError
from model_registry.atomic import write_atomically
from model_registry.configfile.problems import expected
from model_registry.schema import Inconsistent


class Overlay(msgspec.Struct, frozen=True):
    """`tenants` holds the fields that were set, by tenant; `drained` names replicas that take no new requests.

    `reloads` grows each time gateways are asked to read the configuration again.
    """

    version: int = 1
    tenants: dict[str, dict[str, Any]] = {}
    drained: tuple[str, ...] = ()
    reloads: int = 0


def applied(config: Config, overlay: Overlay) -> Config:
    """`config` with the tenants as operators changed them, validated as a whole.

    Raises OperatorError, naming each field, where the two do not go together.
    """
    if not overlay.tenants:
        return config
    plain = config.model_dump(mode="json", exclude_unset=True)
    listed = {tenant["name"]: tenant for tenant in plain.get("tenants", ())}
    for name, fields in overlay.tenants.items():
        listed[name] = listed.get(name, {"name": name}) | fields
    try:
        return Config.model_validate(plain | {"tenants": list(listed.values())})
    except ValidationError as error:
        raise _refused(error, list(listed)) from error


def _refused(error: ValidationError, names: list[str]) -> OperatorError:
    """Every fault in words, with the tenant's name in the place of its number. What was given is not repeated."""
    said, remedies = [], []
    for fault in error.errors(include_url=False, include_input=False):
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, Inconsistent):
            said += [f"{_at((*fault['loc'], *problem.at), names)}: {problem.message}" for problem in cause.problems]
            remedies += [problem.remedy for problem in cause.problems if problem.remedy]
        else:
            said.append(f"{_at(fault['loc'], names)}: {_words(fault)}")
    return OperatorError("; ".join(said), where="tenants", remedy=" ".join(dict.fromkeys(remedies)) or None)


def _words(fault: Mapping[str, Any]) -> str:
    if (told := expected(fault["type"], fault.get("ctx", {}))) is not None:
        return f"must be {told}, as JSON" if told == "a mapping" else f"must be {told}"
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"]).removeprefix("Value error, ")
    near = get_close_matches(str(fault["loc"][-1]), TenantConfig.model_fields, 1)
    return f"there is no such field; did you mean {near[0]!r}?" if near else "there is no such field"


def _at(location: tuple[int | str, ...], names: list[str]) -> str:
    match location:
        case ("tenants", int(index), *rest) if index < len(names):
            location = ("tenants", names[index], *rest)
    return ".".join(map(str, location))


@dataclass(frozen=True, slots=True)
class OverlayStore:
    """The overlay in one state directory. Any number of processes may use it."""

    root: Path

    @property
    def path(self) -> Path:
        """The file that gateways follow."""
        return self.root / "operator.json"

    def load(self) -> Overlay:
        """The overlay as it is on disk; an empty one where there is none. Raises OverlayError."""
        try:
            overlay = msgspec.json.decode(self.path.read_bytes(), type=Overlay)
        except FileNotFoundError:
            return Overlay()
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise OverlayError(
                f"what operators changed cannot be read: {why}",
                where=str(self.path),
                remedy="Restore the file from a copy, or move it away to go by the configuration alone.",
            ) from error
        if overlay.version != 1:
            raise OverlayError(
                f"it is of version {overlay.version}, this sliceway reads version 1",
                where=str(self.path),
                remedy="Use the sliceway that wrote it.",
            )
        return overlay

    @contextmanager
    def changing(self) -> Iterator[list[Overlay]]:
        """A list of one overlay, to be replaced in the block by another; written when the block ends well. One process at a time."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.root / "operator.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OverlayError(
                f"it cannot be changed: {error.strerror}", where=str(self.root), remedy="Check who owns `state_dir`."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.load()
            draft = [before]
            yield draft
            if draft[0] != before:
                data = msgspec.json.format(msgspec.json.encode(draft[0])) + b"\n"
                write_atomically(self.path, data, mode=0o600)
        finally:
            os.close(lock)


def with_fields(overlay: Overlay, tenant: str, fields: Mapping[str, Any]) -> Overlay:
    """The overlay with `fields` of `tenant` set; None takes a field back. A mapping replaces the one before as a whole."""
    merged = {**overlay.tenants.get(tenant, {}), **fields}
    kept = {name: value for name, value in merged.items() if value is not None}
    return msgspec.structs.replace(overlay, tenants={**overlay.tenants, tenant: kept})


def without_tenant(overlay: Overlay, tenant: str) -> Overlay:
    """The overlay without anything about `tenant`."""
    left = {name: fields for name, fields in overlay.tenants.items() if name != tenant}
    return msgspec.structs.replace(overlay, tenants=left)
