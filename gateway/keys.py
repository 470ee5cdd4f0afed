"""Tenants' API keys: made once, shown once, kept as keyed hashes.

A key is `sk-sliceway-<id>-<secret>`: eight characters by which it is found and named, and 256 random bits. The store keeps
HMAC-SHA256(pepper, key); the pepper lies in a file of its own (0600), so that a stolen store alone can check no guess. A plain
fast hash is right here: the secret cannot be guessed, unlike a password.

::

    STATE/keys.json      {"version": 1, "keys": [...]}; replaced atomically, read by gateways, watched
    STATE/keys.secret    the pepper, 32 bytes
    STATE/keys.lock      held (flock) while the store changes
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.errors import InvalidKey, KeystoreError, UnknownKey
from model_registry.atomic import write_atomically

PREFIX = "sk-sliceway-"
ID_CHARS = 8
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: ids are read aloud and typed
_KEY = re.compile(rf"{PREFIX}([{_ALPHABET}]{{{ID_CHARS}}})-[A-Za-z0-9_-]{{43}}")
_PEPPER_BYTES = 32

WallClock = Callable[[], float]


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One key as it is stored. Times are seconds since 1970, UTC; `digest` is hexadecimal."""

    id: str
    tenant: str
    digest: str
    created: float
    name: str = ""
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def as_public(self, now: float) -> dict[str, object]:
        """For people and `--json`: everything but the digest."""
        shown = {name: getattr(self, name) for name in ("id", "tenant", "name", "created", "expires", "revoked")}
        return shown | {"state": self.state(now)}


class _Store(msgspec.Struct, frozen=True):
    version: int
    keys: tuple[KeyRecord, ...]


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys at one moment, ready to be asked. Immutable; a changed store makes a new one."""

    records: dict[str, KeyRecord]
    pepper: bytes

    def tenant_of(self, key: str, now: float) -> str:
        """Whose key this is.

        Raises InvalidKey if it is malformed, unknown, revoked or expired. The record is found by the id in the key; the secret is
        compared in constant time, and an unknown id costs as much as a known one.
        """
        match = _KEY.fullmatch(key)
        record = self.records.get(match.group(1)) if match else None
        digest = digest_of(key, self.pepper)
        if not hmac.compare_digest(digest, record.digest if record else "0" * 64) or record is None:
            raise InvalidKey(
                "The API key is not valid. Ask whoever runs this gateway for one (`sliceway keys create`)."
            )
        if (state := record.state(now)) != "active":
            raise InvalidKey(f"The API key {record.id!r} is {state}. Ask whoever runs this gateway for a new one.")
        return record.tenant


def digest_of(key: str, pepper: bytes) -> str:
    """HMAC-SHA256 of `key`, in hexadecimal."""
    return hmac.digest(pepper, key.encode("utf-8", "surrogateescape"), "sha256").hex()


@dataclass(frozen=True, slots=True)
class Keystore:
    """The key files in one state directory. Any number of processes may use it."""

    root: Path

    @property
    def path(self) -> Path:
        """The file that gateways watch."""
        return self.root / "keys.json"

    def load(self) -> Keyring:
        """The keys as they are on disk; an empty ring where there is no store yet.

        Raises KeystoreError if the store or its secret is damaged or out of reach.
        """
        records = self._read()
        return Keyring({record.id: record for record in records}, self._pepper() if records else b"\0" * _PEPPER_BYTES)

    def create(
        self, tenant: str, *, now: float, name: str = "", lifetime_seconds: float | None = None
    ) -> tuple[str, KeyRecord]:
        """A new key for `tenant`: the key itself, which nobody can show again, and its record."""
        with self._changing() as records:
            key_id = _fresh_id({record.id for record in records})
            key = f"{PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
            record = KeyRecord(
                id=key_id,
                tenant=tenant,
                digest=digest_of(key, self._pepper(create=True)),
                created=now,
                name=name,
                expires=None if lifetime_seconds is None else now + lifetime_seconds,
            )
            records.append(record)
        return key, record

    def revoke(self, key_id: str, *, now: float) -> KeyRecord:
        """Make the key with this id (or the whole key) worthless; gateways notice within a second. Revoking twice changes nothing.

        Raises UnknownKey.
        """
        match = _KEY.fullmatch(key_id)
        wanted = match.group(1) if match else key_id
        with self._changing() as records:
            for index, record in enumerate(records):
                if record.id == wanted:
                    records[index] = msgspec.structs.replace(record, revoked=record.revoked or now)
                    return records[index]
        known = ", ".join(record.id for record in records) or "none"
        raise UnknownKey(
            f"there is no key {wanted!r}",
            where=str(self.path),
            remedy=f"Keys there are: {known}. `sliceway keys list` shows them.",
        )

    def records(self) -> tuple[KeyRecord, ...]:
        """Every key ever made here, oldest first."""
        return self._read()

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            store = msgspec.json.decode(self.path.read_bytes(), type=_Store)
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError) as error:
            raise KeystoreError(
                f"the keys cannot be read: {error}",
                where=str(self.path),
                remedy="Restore the file from a copy, or move it away and create new keys.",
            ) from error
        if store.version != 1:
            raise KeystoreError(
                f"the keys are of version {store.version}, this sliceway reads version 1",
                where=str(self.path),
                remedy="Use the sliceway that wrote them.",
            )
        return store.keys

    def _pepper(self, *, create: bool = False) -> bytes:
        path = self.root / "keys.secret"
        try:
            pepper = path.read_bytes()
        except FileNotFoundError:
            if not create or self._read():
                raise self._lost(path, "is missing") from None
            pepper = secrets.token_bytes(_PEPPER_BYTES)
            write_atomically(path, pepper, mode=0o600)
        except OSError as error:
            raise self._lost(path, f"cannot be read: {error}") from error
        if len(pepper) != _PEPPER_BYTES:
            raise self._lost(path, "is damaged")
        return pepper

    @staticmethod
    def _lost(path: Path, what: str) -> KeystoreError:
        return KeystoreError(
            f"the secret of the keystore {what}",
            where=str(path),
            remedy="Restore it from a copy; without it every key is void: move keys.json away and create new keys.",
        )

    @contextmanager
    def _changing(self) -> Iterator[list[KeyRecord]]:
        """The records to change, written back when the block ends well; one process at a time."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.root / "keys.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KeystoreError(
                f"the keystore cannot be changed: {error}",
                where=str(self.root),
                remedy="Check `state_dir` and who owns it.",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = list(self._read())
            before = list(records)
            yield records
            if records != before:
                write_atomically(
                    self.path, msgspec.json.format(msgspec.json.encode(_Store(1, tuple(records)))) + b"\n", mode=0o600
                )
        finally:
            os.close(lock)


def _fresh_id(taken: set[str]) -> str:
    while True:
        candidate = "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARS))
        if candidate not in taken:
            return candidate
