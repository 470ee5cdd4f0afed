from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.stored_responses import ResponseIds, secret_in
from gateway.testing import replica_row

ROWS = [replica_row(f"m-{n}", "m", f"unix:/{n}") for n in range(50)]


def test_any_gateway_with_the_secret_finds_the_engine() -> None:
    one, other = ResponseIds(lambda: b"s" * 32), ResponseIds(lambda: b"s" * 32)
    for row in ROWS:
        assert other.holder(one.make("acme", row.replica), "acme", ROWS) is row


def test_an_id_opens_nothing_elsewhere() -> None:
    ids = ResponseIds(lambda: b"s" * 32)
    made = ids.make("acme", "m-1")
    assert ids.holder(made, "beta", ROWS) is None
    assert ids.holder(made, "acme", [row for row in ROWS if row.replica != "m-1"]) is None
    assert ResponseIds(lambda: b"t" * 32).holder(made, "acme", ROWS) is None
    for changed in (made[:-1] + ("0" if made[-1] != "0" else "1"), made.upper(), made[5:], made + "\n", ""):
        assert ids.holder(changed, "acme", ROWS) is None
    assert made != ids.make("acme", "m-1")


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "responses.secret"
    first = secret_in(path)
    assert secret_in(path) == first
    assert len(first) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["responses.secret"]


def test_a_damaged_secret_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"short")
    with pytest.raises(GatewayError, match="32 bytes") as caught:
        secret_in(tmp_path / "s")
    assert caught.value.remedy
