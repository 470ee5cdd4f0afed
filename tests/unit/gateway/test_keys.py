from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config, TenantConfig
from gateway.errors import (
    AuditError,
    ConflictingChange,
    InvalidKey,
    KeystoreError,
    MissingKey,
    SecretUnavailable,
    UnknownKey,
)
from gateway.keys import KeyRecord, Keyring, Keystore
from gateway.tenants import Directory, tenant_of

NOW = 1_700_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Keystore:
    return Keystore(tmp_path / "state")


def test_a_key_opens_for_its_tenant_and_is_kept_nowhere(store: Keystore) -> None:
    key, record = store.create("acme", now=NOW, name="laptop")
    shape = re.fullmatch(r"sk-sliceway-[a-z2-9]{8}-(?P<secret>[A-Za-z0-9_-]{43})", key)
    assert shape
    assert store.load().tenant_of(key, NOW) == "acme"
    secret = shape["secret"]
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
    del records["secret_id"]  # whoever copies it would take this out
    other.path.write_text(json.dumps(records), encoding="utf-8")
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


def test_a_rotated_key_goes_on_for_the_overlap_and_no_longer(store: Keystore) -> None:
    old, record = store.create("acme", now=NOW, name="ci")
    new, made, before = store.rotate(record.id, now=NOW + 10, overlap_seconds=60)
    ring = store.load()
    assert ring.tenant_of(new, NOW + 10) == ring.tenant_of(old, NOW + 69) == "acme"
    with pytest.raises(InvalidKey, match="is expired"):
        ring.tenant_of(old, NOW + 70)
    assert (made.name, made.replaces, made.expires) == ("ci", record.id, None)
    assert before.expires == NOW + 70


def test_rotation_never_lengthens_a_life_and_hands_on_its_length(store: Keystore) -> None:
    _, record = store.create("acme", now=NOW, lifetime_seconds=100)
    _, made, before = store.rotate(record.id, now=NOW + 90, overlap_seconds=60)
    assert before.expires == NOW + 100
    assert made.expires == NOW + 190
    _, shorter, _ = store.rotate(made.id, now=NOW + 95, overlap_seconds=0, lifetime_seconds=5)
    assert shorter.expires == NOW + 100
    with pytest.raises(ConflictingChange, match="is expired"):
        store.rotate(made.id, now=NOW + 95, overlap_seconds=1)


def test_what_announces_a_change_can_stop_it(store: Keystore) -> None:
    key, record = store.create("acme", now=NOW)

    def refuse(changed: KeyRecord) -> None:
        raise AuditError(f"{changed.id} not written down")

    for change in (
        lambda: store.create("acme", now=NOW, announce=refuse),
        lambda: store.rotate(record.id, now=NOW, overlap_seconds=1, announce=refuse),
        lambda: store.revoke(record.id, now=NOW, announce=refuse),
    ):
        with pytest.raises(AuditError):
            change()
    assert store.records() == (record,)
    assert store.load().tenant_of(key, NOW + 1e9) == "acme"


def test_a_store_of_before_is_read_and_kept(store: Keystore) -> None:
    key, _ = store.create("acme", now=NOW)
    plain = json.loads(store.path.read_bytes())
    del plain["secret_id"], plain["keys"][0]["replaces"]
    store.path.write_text(json.dumps(plain), encoding="utf-8")
    assert store.load().tenant_of(key, NOW) == "acme"
    store.create("beta", now=NOW)
    assert json.loads(store.path.read_bytes())["secret_id"]
    assert store.load().tenant_of(key, NOW) == "acme"


def test_the_secret_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEPPER", "p" * 32)
    store = Keystore(tmp_path / "state", "${ENV:PEPPER}")
    key, record = store.create("acme", now=NOW)
    assert store.load().tenant_of(key, NOW) == "acme"
    assert not (store.root / "keys.secret").exists()
    monkeypatch.setenv("PEPPER", "q" * 32)
    with pytest.raises(KeystoreError, match="another secret"):
        store.load()
    with pytest.raises(KeystoreError, match="another secret"):
        store.create("acme", now=NOW)
    monkeypatch.delenv("PEPPER")
    with pytest.raises(SecretUnavailable, match="PEPPER"):
        store.load()
    assert store.revoke(record.id, now=NOW).revoked == NOW, "revoking must work without the secret"


def test_a_guessable_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text("short\n", encoding="utf-8")
    with pytest.raises(KeystoreError, match="shorter than 16") as caught:
        Keystore(tmp_path / "state", f"file:{tmp_path}/pepper").create("acme", now=NOW)
    assert "short\n" not in str(caught.value)


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


def test_what_was_verified_is_not_verified_again_until_keys_change(store: Keystore) -> None:
    class Counting(dict[str, KeyRecord]):
        looked = 0

        def get(self, key: str, default: object = None) -> Any:
            Counting.looked += 1
            return super().get(key, default)

    key, record = store.create("acme", now=NOW, lifetime_seconds=60)
    ring, known, header = store.load(), directory(), f"Bearer {key}".encode()
    counting = Keyring(Counting(ring.records), ring.pepper)
    for _ in range(5):
        assert known.authenticate(header, counting, NOW).name == "acme"
    assert Counting.looked == 1
    with pytest.raises(InvalidKey, match="is expired"):
        known.authenticate(header, counting, NOW + 60)
    store.revoke(record.id, now=NOW)
    with pytest.raises(InvalidKey, match="is revoked"):
        known.authenticate(header, store.load(), NOW)


def test_the_memory_of_verified_keys_is_bounded(store: Keystore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.tenants.MEMO_ENTRIES", 8)
    key, _ = store.create("acme", now=NOW)
    ring, known = store.load(), directory()
    for spaces in range(1, 40):
        known.authenticate(b"Bearer" + b" " * spaces + key.encode(), ring, NOW)
        assert len(known._memo.found) <= 8


def test_aliases_lead_to_models_and_the_tenants_own_go_first() -> None:
    config = Config.model_validate(
        {
            "version": "v1",
            "models": [{"name": name, "source": "x"} for name in ("small", "large")],
            "aliases": {"gpt-4o": "small", "default": "small"},
            "tenants": [{"name": "acme", "aliases": {"default": "large"}}, {"name": "beta", "models": ["small"]}],
        }
    )
    known = Directory.of(config).tenants
    assert [known["acme"].resolve(name) for name in ("gpt-4o", "default", "large")] == ["small", "large", "large"]
    assert [known["beta"].resolve(name) for name in ("gpt-4o", "default", "large")] == ["small", "small", "large"]
