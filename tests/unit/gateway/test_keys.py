from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest

from gateway.config import TenantConfig
from gateway.errors import InvalidKey, KeystoreError, MissingKey, UnknownKey
from gateway.keys import Keyring, Keystore
from gateway.tenants import Directory, tenant_of

NOW = 1_700_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "state")


def test_a_key_opens_for_its_tenant_and_is_kept_nowhere(store: Keystore) -> None:
    key, record = store.create("acme", now=NOW, name="laptop")
    assert re.fullmatch(r"sk-sliceway-[a-z2-9]{8}-[A-Za-z0-9_-]{43}", key)
    assert store.load().tenant_of(key, NOW) == "acme"
    secret = key.rpartition("-")[2]
    for file in store.root.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
    assert "digest" not in record.as_public(NOW)


def test_no_two_keys_are_alike(store: Keystore) -> None:
    made = [store.create("acme", now=NOW) for _ in range(20)]
    assert len({key for key, _ in made}) == len({record.id for _, record in made}) == 20
    assert [r.id for r in store.records()] == [record.id for _, record in made]


def test_a_wrong_secret_under_a_known_id_is_refused(store: Keystore) -> None:
    first, second = store.create("acme", now=NOW)[0], store.create("beta", now=NOW)[0]
    ring = store.load()
    for wrong in (
        first[:20] + second[20:],
        first[:-1] + ("a" if first[-1] != "a" else "b"),
        first + "a",
        first[:-1],
        "",
        "sk-sliceway-",
        "Ünïcode",
        "\udcff",
    ):
        with pytest.raises(InvalidKey, match="not valid"):
            ring.tenant_of(wrong, NOW)


def test_expired_and_revoked_keys_say_so(store: Keystore) -> None:
    short, _ = store.create("acme", now=NOW, lifetime_seconds=60)
    assert store.load().tenant_of(short, NOW + 59) == "acme"
    with pytest.raises(InvalidKey, match="is expired"):
        store.load().tenant_of(short, NOW + 60)
    key, record = store.create("acme", now=NOW)
    store.revoke(record.id, now=NOW + 1)
    with pytest.raises(InvalidKey, match="is revoked"):
        store.load().tenant_of(key, NOW + 2)


def test_revoking_takes_an_id_or_a_key_and_keeps_its_first_time(store: Keystore) -> None:
    key, record = store.create("acme", now=NOW)
    assert store.revoke(key, now=NOW + 1).revoked == NOW + 1
    assert store.revoke(record.id, now=NOW + 9).revoked == NOW + 1
    with pytest.raises(UnknownKey, match=record.id):
        store.revoke("nobody", now=NOW)


def test_there_are_no_keys_before_the_first(store: Keystore) -> None:
    assert store.load() == Keyring({}, b"\0" * 32)
    with pytest.raises(InvalidKey):
        store.load().tenant_of("sk-sliceway-aaaaaaaa-" + "x" * 43, NOW)


@pytest.mark.parametrize("damage", ["half", "not json", "other version", "other shape"])
def test_a_damaged_store_is_told_and_never_overwritten(store: Keystore, damage: str) -> None:
    store.create("acme", now=NOW)
    good = store.path.read_bytes()
    bad = {
        "half": good[: len(good) // 2],
        "not json": b"\0",
        "other version": good.replace(b'"version": 1', b'"version": 2'),
        "other shape": b'{"version": 1, "keys": [{}]}',
    }[damage]
    store.path.write_bytes(bad)
    for attempt in (store.load, lambda: store.create("acme", now=NOW), lambda: store.revoke("x", now=NOW)):
        with pytest.raises(KeystoreError, match=r"keys\.json"):
            attempt()
    assert store.path.read_bytes() == bad


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_lost_secret_is_told_and_not_replaced(store: Keystore, damage: str) -> None:
    store.create("acme", now=NOW)
    secret = store.root / "keys.secret"
    secret.unlink() if damage == "gone" else secret.write_bytes(b"short")
    with pytest.raises(KeystoreError, match=r"keys\.secret"):
        store.load()
    with pytest.raises(KeystoreError, match=r"keys\.secret"):
        store.create("acme", now=NOW)


def test_the_store_alone_checks_no_guess(store: Keystore, tmp_path: Path) -> None:
    key, _ = store.create("acme", now=NOW)
    other = Keystore(tmp_path / "other")
    other.create("x", now=NOW)
    records = json.loads(store.path.read_bytes())
    other.path.write_text(json.dumps(records))
    with pytest.raises(InvalidKey):
        other.load().tenant_of(key, NOW)


def test_many_writers_lose_no_key(store: Keystore) -> None:
    def make() -> None:
        for _ in range(5):
            store.create("acme", now=NOW)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.records()) == 30


# ---- who a header belongs to


def directory(**options: bool) -> Directory:
    return Directory({"acme": tenant_of(TenantConfig(name="acme", models=("m",)))}, **options)


def test_a_header_finds_its_tenant(store: Keystore) -> None:
    key, _ = store.create("acme", now=NOW)
    for header in (f"Bearer {key}", f"bearer {key}", f"BEARER   {key} "):
        tenant = directory().authenticate(header.encode(), store.load(), NOW)
        assert tenant.name == "acme"
        assert tenant.may_use("m")
        assert not tenant.may_use("n")


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic abc", b"sk-sliceway-x"])
def test_a_header_without_a_key_says_how_to_send_one(header: bytes | None, store: Keystore) -> None:
    with pytest.raises(MissingKey, match="Authorization: Bearer"):
        directory().authenticate(header, store.load(), NOW)


def test_a_key_outlives_its_tenant_in_vain(store: Keystore) -> None:
    key, _ = store.create("gone", now=NOW)
    with pytest.raises(InvalidKey, match="no longer exists"):
        directory().authenticate(f"Bearer {key}".encode(), store.load(), NOW)


def test_without_keys_everyone_is_anonymous_and_may_use_everything(store: Keystore) -> None:
    tenant = directory(keys_required=False).authenticate(b"Bearer whatever", store.load(), NOW)
    assert tenant.name == "anonymous"
    assert tenant.may_use("anything")
