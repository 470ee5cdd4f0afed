from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_registry.errors import ModelUnreadable
from model_registry.sizing.throughput import Throughput, ThroughputKey, ThroughputStore

KEY = ThroughputKey("org/chat", "mig", "1g.10gb", "h100-sxm", None, 256, 64, {"ttft_seconds": 0.5, "attainment": 0.99})
RECORD = Throughput(
    key=KEY,
    model="chat",
    requests_per_second=4.0,
    fails_at=4.3,
    output_tokens_per_second=256.0,
    prompt_tokens_per_second=1024.0,
    attainment=0.995,
    ttft_p99_seconds=0.45,
    itl_p99_seconds=0.03,
    measured_at="2026-01-01T00:00:00+00:00",
    price_per_hour=0.46,
    notes=("a note",),
)


def test_records_come_back_as_they_were_put(tmp_path: Path) -> None:
    store = ThroughputStore(tmp_path / "throughput.json")
    assert store.all() == ()
    store.put(RECORD)
    assert store.find(KEY) == RECORD
    assert store.of("org/chat") == (RECORD,)
    assert store.of("org/other") == ()


def test_a_newer_measurement_takes_the_olders_place_and_no_others(tmp_path: Path) -> None:
    store = ThroughputStore(tmp_path / "throughput.json")
    whole = replace(RECORD, key=replace(KEY, kind="gpu", profile=None))
    for record in (RECORD, whole, replace(RECORD, requests_per_second=5.0)):
        store.put(record)
    assert sorted(r.requests_per_second for r in store.all()) == [4.0, 5.0]
    assert store.find(whole.key) == whole


def test_the_price_is_per_million_output_tokens() -> None:
    assert RECORD.price_per_million_tokens == pytest.approx(0.46 / 3600 / 256 * 1e6)
    assert replace(RECORD, price_per_hour=None).price_per_million_tokens is None
    assert replace(RECORD, output_tokens_per_second=0.0).price_per_million_tokens is None


@pytest.mark.parametrize("text", ["{", '{"version": 1}', '{"records": [{"model": "x"}]}'])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "throughput.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelUnreadable) as caught:
        ThroughputStore(path).all()
    assert "bench capacity" in (caught.value.remedy or "")
