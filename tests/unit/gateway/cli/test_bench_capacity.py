from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.cli.bench_capacity import _slo, public, share_of_card
from model_registry.errors import ConfigError
from model_registry.sizing.throughput import Throughput, ThroughputKey
from placement.slices import Gpu, Slice, SliceKind

GIB = 2**30
H100 = Gpu("GPU-0", 0, "h100-sxm", 80 * GIB)


def cpu(name: str, *cores: int) -> Slice:
    return Slice(name, SliceKind.CPU, None, GIB, cores=cores)


def test_a_slice_costs_its_share_of_the_card() -> None:
    mig = Slice("a", SliceKind.MIG, "3g.40gb", 40 * GIB, uuid="MIG-1", gpu=H100)
    small = Slice("b", SliceKind.MIG, "1g.10gb", 10 * GIB, uuid="MIG-2", gpu=H100)
    whole = Slice("c", SliceKind.GPU, None, 80 * GIB, uuid="GPU-0", gpu=H100)
    shared = replace(whole, kind=SliceKind.MPS, sharers=4)
    assert share_of_card(mig, [mig]) == pytest.approx(4 / 8)
    assert share_of_card(small, [small]) == pytest.approx(1 / 8)
    assert share_of_card(whole, [whole]) == 1
    assert share_of_card(shared, [shared]) == 0.25
    unknown = replace(mig, gpu=replace(H100, product="a card nobody knows"))
    assert share_of_card(unknown, [unknown]) == pytest.approx(0.5)


def test_a_core_set_costs_its_share_of_the_cores() -> None:
    assert share_of_card(cpu("a", 0), [cpu("a", 0), cpu("b", 1, 2, 3)]) == 0.25


def test_the_whole_card_is_what_a_slice_is_set_beside() -> None:
    key = ThroughputKey("org/chat", "mig", "1g.10gb", "h100-sxm", None, 256, 64, {"ttft_seconds": 0.5})
    one = Throughput(key, "chat", 2.0, 2.2, 128.0, 512.0, 0.99, 0.4, 0.03, "2026-01-01T00:00:00+00:00")
    assert public(one, 1024.0)["share_of_whole_card"] == 0.125
    assert public(one, None)["share_of_whole_card"] is None
    assert public(one, None)["slice"] == "h100-sxm 1g.10gb"


def test_limits_of_an_slo_are_read_with_their_units() -> None:
    assert _slo(["ttft=500ms", "e2e=3s"]) == {"ttft": "500ms", "e2e": "3s"}
    for wrong in (["ttft"], ["speed=3s"], ["ttft=3"], []):
        with pytest.raises(ConfigError):
            _slo(wrong)
