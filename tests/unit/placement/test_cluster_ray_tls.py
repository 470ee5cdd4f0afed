"""What is said where Ray encrypts nothing, and where it is told to without what that takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_registry.errors import ConfigError
from placement.cluster.ray_tls import FILES, SWITCH, encrypts, in_clear


def complete(folder: Path, switch: str = "1") -> dict[str, str]:
    for name in FILES:
        (folder / name).write_text("PEM", encoding="utf-8")
    return {SWITCH: switch} | {name: str(folder / name) for name in FILES}


@pytest.mark.parametrize("switch", ["1", "true", "True"])
def test_who_has_ray_encrypt_is_told_nothing(switch: str, tmp_path: Path) -> None:
    environ = complete(tmp_path, switch)
    assert encrypts(environ)
    assert in_clear("10.0.0.5:6379", environ) is None


@pytest.mark.parametrize("environ", [{}, {SWITCH: "0"}, {SWITCH: ""}])
def test_a_network_that_others_may_read_is_warned_of(environ: dict[str, str]) -> None:
    said = in_clear("10.0.0.5:6379", environ)
    assert said is not None
    assert "RAY_USE_TLS=1" in said
    assert "token" in said
    assert "\n" not in said
    for host in ("127.0.0.1", "[::1]", "localhost"):
        assert in_clear(f"{host}:6379", environ) is None


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("value", [None, "", "/nowhere/at-all.pem"])
def test_encryption_without_a_file_is_wrong_input(missing: str, value: str | None, tmp_path: Path) -> None:
    environ = complete(tmp_path)
    del environ[missing]
    environ |= {missing: value} if value is not None else {}
    with pytest.raises(ConfigError) as refused:
        encrypts(environ)
    assert refused.value.where == missing
    assert "PEM" in str(refused.value.remedy)
