"""Tenants' API keys: made once, shown once, kept as keyed hashes.

A key is `sk-sliceway-<id>-<secret>`: eight characters by which it is found and named, and 256 random bits. The store keeps
HMAC-SHA256(pepper, key); the pepper lies in a file of its own (0600) or where `gateway.keys_secret` says, so that a stolen
store alone can check no guess. A plain fast hash is right here: the secret cannot be guessed, unlike a password.

::

    STATE/keys.json      {"version": 1, "secret_id": ..., "keys": [...]}; replaced atomically, read by gateways, watched
    STATE/keys.secret    the pepper, 32 bytes; not there where `gateway.keys_secret` is set
    STATE/keys.lock      held (flock) while the store changes

`secret_id` tells which pepper made the digests without telling the pepper: another one is an error in words, instead of
every key being refused. Stores that were written without it are read as they are.
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

from gateway.config import Config
from gateway.errors import ConflictingChange, InvalidKey, KeystoreError, UnknownKey
from gateway.secret_values import fetch
from model_registry.atomic import write_atomically

PREFIX = "sk-sliceway-"
ID_CHARS = 8
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: ids are read aloud and typed
_KEY = re.compile(rf"{PREFIX}([{_ALPHABET}]{{{ID_CHARS}}})-[A-Za-z0-9_-]{{43}}")
_PEPPER_BYTES = 32
_LEAST_SECRET_BYTES = 16  # of one that the operator chose

WallClock = Callable[[], float]
Announce = Callable[["KeyRecord"], object]
"""Called with a record before it is written; what it raises stops the change."""


class KeyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One key as it is stored. Times are seconds since 1970, UTC; `digest` is hexadecimal; `replaces` is the id of a rotated key."""

    id: str
    tenant: str
    digest: str
    created: float
    name: str = ""
    expires: float | None = None
    revoked: float | None = None
    replaces: str | None = None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def as_public(self, now: float) -> dict[str, object]:
        """For people and `--json`: everything but the digest."""
        names = ("id", "tenant", "name", "created", "expires", "revoked", "replaces")
        shown = {name: getattr(self, name) for name in names}
        return shown | {"state": self.state(now)}


class _Store(msgspec.Struct, frozen=True):
    version: int
    keys: tuple[KeyRecord, ...]
    secret_id: str | None = None


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys at one moment, ready to be asked. Immutable; a changed store makes a new one."""

    records: dict[str, KeyRecord]
    pepper: bytes

    def record_of(self, key: str, now: float) -> KeyRecord:
        """The record of `key`.

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
        return record

    def tenant_of(self, key: str, now: float) -> str:
        """Whose key this is. Raises InvalidKey, as `record_of` does."""
        return self.record_of(key, now).tenant


def digest_of(key: str, pepper: bytes) -> str:
    """HMAC-SHA256 of `key`, in hexadecimal."""
    return hmac.digest(pepper, key.encode("utf-8", "surrogateescape"), "sha256").hex()


def key_id_of(text: str) -> str:
    """The id in `text`, which is a whole key or an id already."""
    match = _KEY.fullmatch(text)
    return match.group(1) if match else text


@dataclass(frozen=True, slots=True)
class Keystore:
    """The key files in one state directory. Any number of processes may use it.

    `secret` refers to the pepper where it is not kept beside the keys (`gateway.secret_values`).
    """

    root: Path
    secret: str | None = None

    @classmethod
    def of(cls, config: Config) -> Keystore:
        """The one that `config` means."""
        return cls(config.state, config.gateway.keys_secret)

    @property
    def path(self) -> Path:
        """The file that gateways watch."""
        return self.root / "keys.json"

    def load(self) -> Keyring:
        """The keys as they are on disk; an empty ring where there is no store yet.

        Raises KeystoreError or SecretUnavailable if the store or its secret is damaged or out of reach.
        """
        store = self._read()
        if not store.keys:
            return Keyring({}, b"\0" * _PEPPER_BYTES)
        return Keyring({record.id: record for record in store.keys}, self._pepper_of(store))

    def create(
        self,
        tenant: str,
        *,
        now: float,
        name: str = "",
        lifetime_seconds: float | None = None,
        announce: Announce | None = None,
    ) -> tuple[str, KeyRecord]:
        """A new key for `tenant`: the key itself, which nobody can show again, and its record."""
        with self._changing() as records:
            expires = None if lifetime_seconds is None else now + lifetime_seconds
            return self._added(records, announce, tenant=tenant, name=name, created=now, expires=expires)

    def rotate(
        self,
        key: str,
        *,
        now: float,
        overlap_seconds: float,
        lifetime_seconds: float | None = None,
        announce: Announce | None = None,
    ) -> tuple[str, KeyRecord, KeyRecord]:
        """A new key in the place of `key` (an id or the whole key), which goes on for `overlap_seconds`: the key, its record, the old one's.

        The new one lives for `lifetime_seconds`, or as long as the old one was to live from its making.
        Raises UnknownKey, and ConflictingChange for a key that is worthless already.
        """
        with self._changing() as records:
            index = self._index(records, key)
            old = records[index]
            if (state := old.state(now)) != "active":
                raise ConflictingChange(
                    f"the key {old.id!r} is {state}; there is nothing to hand over",
                    where=str(self.path),
                    remedy=f"Make a new one: sliceway keys create {old.tenant}",
                )
            if lifetime_seconds is None and old.expires is not None:
                lifetime_seconds = old.expires - old.created
            expires = None if lifetime_seconds is None else now + lifetime_seconds
            made, record = self._added(
                records, announce, tenant=old.tenant, name=old.name, created=now, expires=expires, replaces=old.id
            )
            ends = now + overlap_seconds
            records[index] = msgspec.structs.replace(
                old, expires=ends if old.expires is None else min(old.expires, ends)
            )
            return made, record, records[index]

    def revoke(self, key: str, *, now: float, announce: Announce | None = None) -> KeyRecord:
        """Make the key with this id (or the whole key) worthless; gateways notice within a second. Revoking twice changes nothing.

        Raises UnknownKey.
        """
        with self._changing() as records:
            index = self._index(records, key)
            if records[index].revoked is None:
                revoked = msgspec.structs.replace(records[index], revoked=now)
                if announce is not None:
                    announce(revoked)
                records[index] = revoked
            return records[index]

    def records(self) -> tuple[KeyRecord, ...]:
        """Every key ever made here, oldest first."""
        return self._read().keys

    def derived(self, purpose: bytes) -> bytes:
        """A key for another purpose than hashing API keys, made from the pepper; 32 bytes, always the same ones."""
        if self.secret is None and not (self.root / "keys.secret").exists():
            with self._changing():
                return hmac.digest(self._pepper(create=True), purpose, "sha256")
        return hmac.digest(self._pepper(), purpose, "sha256")

    def _added(
        self,
        records: list[KeyRecord],
        announce: Announce | None,
        *,
        tenant: str,
        name: str,
        created: float,
        expires: float | None,
        replaces: str | None = None,
    ) -> tuple[str, KeyRecord]:
        key_id = _fresh_id({record.id for record in records})
        key = f"{PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
        digest = digest_of(key, self._pepper_of(self._read(), create=True))
        record = KeyRecord(key_id, tenant, digest, created, name=name, expires=expires, replaces=replaces)
        if announce is not None:
            announce(record)
        records.append(record)
        return key, record

    def _index(self, records: list[KeyRecord], key: str) -> int:
        wanted = key_id_of(key)
        for index, record in enumerate(records):
            if record.id == wanted:
                return index
        known = ", ".join(record.id for record in records) or "none"
        shown = f"{wanted[:40]!r}" if len(wanted) <= 40 else "of that form"
        raise UnknownKey(
            f"there is no key {shown}",
            where=str(self.path),
            remedy=f"Keys there are: {known}. `sliceway keys list` shows them.",
        )

    def _read(self) -> _Store:
        try:
            store = msgspec.json.decode(self.path.read_bytes(), type=_Store)
        except FileNotFoundError:
            return _Store(1, ())
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
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
        return store

    def _pepper_of(self, store: _Store, *, create: bool = False) -> bytes:
        """The pepper, if it is the one that made the digests of `store`."""
        pepper = self._pepper(create=create)
        if store.secret_id not in (None, _secret_id(pepper)):
            raise KeystoreError(
                "the keys were made with another secret than the one there is",
                where=str(self.path),
                remedy="Set gateway.keys_secret (or restore keys.secret) as it was; or move keys.json away and create new keys.",
            )
        return pepper

    def _pepper(self, *, create: bool = False) -> bytes:
        if self.secret is not None:
            return self._chosen_pepper(self.secret)
        path = self.root / "keys.secret"
        try:
            pepper = path.read_bytes()
        except FileNotFoundError:
            if not create or self._read().keys:
                raise self._lost(path, "is missing") from None
            pepper = secrets.token_bytes(_PEPPER_BYTES)
            write_atomically(path, pepper, mode=0o600)
        except OSError as error:
            raise self._lost(path, f"cannot be read: {error}") from error
        if len(pepper) != _PEPPER_BYTES:
            raise self._lost(path, "is damaged")
        return pepper

    @staticmethod
    def _chosen_pepper(reference: str) -> bytes:
        pepper = fetch(reference, field_name="gateway.keys_secret").value
        if len(pepper) < _LEAST_SECRET_BYTES:
            raise KeystoreError(
                f"the secret is shorter than {_LEAST_SECRET_BYTES} bytes",
                where="gateway.keys_secret",
                remedy="Make a better one: openssl rand -hex 32",
            )
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
            store = self._read()
            records = list(store.keys)
            yield records
            if tuple(records) != store.keys:
                # Revoking needs no secret, so that it works where the secret is not.
                secret_id = _secret_id(self._pepper()) if len(records) > len(store.keys) else store.secret_id
                after = _Store(1, tuple(records), secret_id)
                write_atomically(self.path, msgspec.json.format(msgspec.json.encode(after)) + b"\n", mode=0o600)
        finally:
            os.close(lock)


def _secret_id(pepper: bytes) -> str:
    """A name for `pepper` that tells nothing about it."""
    return hmac.digest(pepper, b"sliceway keystore", "sha256").hex()[:16]


def _fresh_id(taken: set[str]) -> str:
    while True:
        candidate = "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARS))
        if candidate not in taken:
            return candidate
