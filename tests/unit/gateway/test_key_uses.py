from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gateway.config import Config
from gateway.errors import InvalidKey
from gateway.key_uses import USE_SECONDS, WRITE_SECONDS, KeyUses, merge_uses, read_uses
from gateway.keys import Keystore
from gateway.tenants import Directory, Tenant
from gateway.testing import FakeClock
from gateway.wiring import create_gateway

NOW = 1_700_000_000.0


def test_the_latest_use_of_each_key_stays_whoever_writes_last(tmp_path: Path) -> None:
    merge_uses(tmp_path, {"a": NOW + 9, "b": NOW})
    merge_uses(tmp_path, {"a": NOW, "c": NOW + 1})
    assert read_uses(tmp_path) == {"a": NOW + 9, "b": NOW, "c": NOW + 1}
    assert (tmp_path / "keys.used.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"version": 2, "used": {"a": 1}}', b'{"version": 1, "used": {"a": "x"}}']
)
def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "keys.used.json").write_bytes(damage)
    assert read_uses(tmp_path) == {}
    merge_uses(tmp_path, {"a": NOW})
    assert read_uses(tmp_path) == {"a": NOW}


async def test_uses_are_written_every_few_seconds_and_at_the_end(tmp_path: Path) -> None:
    uses = KeyUses(tmp_path)
    await uses.tick(0.0)
    assert not (tmp_path / "keys.used.json").exists()
    uses.note("a", NOW + 0.4)
    await uses.tick(0.0)
    assert read_uses(tmp_path) == {"a": NOW}
    uses.note("b", NOW)
    await uses.tick(WRITE_SECONDS / 2)
    assert read_uses(tmp_path) == {"a": NOW}
    await uses.tick(WRITE_SECONDS)
    assert read_uses(tmp_path) == {"a": NOW, "b": NOW}
    uses.note("c", NOW)
    await uses.write()
    assert "c" in read_uses(tmp_path)


async def test_what_cannot_be_written_is_kept_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "state"
    uses = KeyUses(root)
    uses.note("a", NOW)
    with caplog.at_level(logging.WARNING):
        await uses.write()
        uses.note("b", NOW)
        await uses.write()
    assert len(caplog.records) == 1
    root.mkdir()
    await uses.write()
    assert read_uses(root) == {"a": NOW, "b": NOW}


def test_a_key_in_use_is_noted_once_a_minute_and_not_by_every_request(tmp_path: Path) -> None:
    store = Keystore(tmp_path)
    key, record = store.create("acme", now=NOW)
    authorization = f"Bearer {key}".encode()
    ring, noted = store.load(), []
    directory = Directory({"acme": Tenant("acme")}, note_use=lambda key_id, at: noted.append((key_id, at)))
    for second in range(int(2 * USE_SECONDS)):
        assert directory.authenticate(authorization, ring, NOW + second).name == "acme"
    assert noted == [(record.id, NOW), (record.id, NOW + USE_SECONDS)]


def test_a_key_that_expires_within_the_minute_is_refused_at_its_end(tmp_path: Path) -> None:
    store = Keystore(tmp_path)
    key, _ = store.create("acme", now=NOW, lifetime_seconds=USE_SECONDS / 2)
    authorization, ring = f"Bearer {key}".encode(), store.load()
    directory = Directory({"acme": Tenant("acme")})
    directory.authenticate(authorization, ring, NOW)
    directory.authenticate(authorization, ring, NOW + USE_SECONDS / 2 - 1)
    with pytest.raises(InvalidKey, match="expired"):
        directory.authenticate(authorization, ring, NOW + USE_SECONDS / 2)


async def test_gateways_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    gateways = [KeyUses(tmp_path) for _ in range(8)]
    for number, uses in enumerate(gateways):
        uses.note(f"k{number}", NOW)
    await asyncio.gather(*(uses.write() for uses in gateways))
    assert len(read_uses(tmp_path)) == len(gateways)


def test_a_flood_of_wrong_keys_has_the_files_looked_at_a_few_times(tmp_path: Path) -> None:
    config = Config.model_validate({"version": "v1", "state_dir": str(tmp_path), "tenants": [{"name": "acme"}]})
    clock = FakeClock()
    gateway, _ = create_gateway(config, clock=clock, wall=clock)
    gateway._parts.keyring.poll()
    loads = gateway._parts.keyring.loads
    looks: list[float] = []
    glance = gateway._parts.keyring.glance
    gateway._parts.keyring.glance = lambda: looks.append(clock()) or glance()  # type: ignore[method-assign, func-returns-value]
    for _ in range(100):
        clock.turn(0.001)
        with pytest.raises(InvalidKey):
            gateway.authenticate(b"Bearer sk-sliceway-nothing")
    assert 9 <= len(looks) <= 11
    assert gateway._parts.keyring.loads == loads, "nothing has changed, and nothing was read"
    key, _ = Keystore(tmp_path).create("acme", now=0.0)
    clock.turn(0.02)
    assert gateway.authenticate(f"Bearer {key}".encode()).name == "acme"
    assert gateway._parts.keyring.loads == loads + 1
