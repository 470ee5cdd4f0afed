"""Models against places: where they fit, what they serve there within their latencies, and what would help elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model_registry.catalogue import load_catalogue
from model_registry.schema import ModelConfig
from model_registry.sizing.calibration import Calibration, CalibrationKey
from model_registry.sizing.speed import Demand
from model_registry.sizing.throughput import Throughput, ThroughputKey
from placement.errors import PlacementError
from placement.goals import Registry
from placement.registry import ModelRegistry
from placement.schema import EngineConfig
from placement.workload import Candidate, Card, Subject, Tenant, Workload, tenant_shares, whole_card, workload
from placement.workload.alternatives import alternatives
from placement.workload.measured import Measured, Where
from placement.workload.options import candidates
from placement.workload.subjects import read_subjects

MODELS = Path(__file__).parents[3] / "configs" / "examples" / "models"
DEMAND = {"requests_per_second": 6, "prompt_tokens": 800, "output_tokens": 200}


def model(name: str, file: str, **settings: object) -> ModelConfig:
    given = {"name": name, "source": f"org/{name}", "metadata": str(MODELS / f"{file}.json"), "max_model_len": 8192}
    return ModelConfig.model_validate(given | settings)


def qwen8b(**settings: object) -> ModelConfig:
    return model("chat", "Qwen--Qwen3-8B", **settings)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return ModelRegistry(EngineConfig(), environ={})


@pytest.fixture(scope="module")
def cards() -> dict[str, Card]:
    catalogue = load_catalogue()
    return {name: Card.of(catalogue.product(name)) for name in ("a100-80gb", "h100-sxm", "h200", "a30", "h20")}


def subject(config: ModelConfig, registry: Registry) -> Subject:
    found = read_subjects([config], registry).models[config.name]
    assert isinstance(found, Subject)
    return found


def on(found: tuple[Candidate, ...], profile: str) -> Candidate:
    return next(c for c in found if c.place.profile == profile)


def asked(
    config: ModelConfig, registry: Registry, cards: dict[str, Card], tenants: tuple[Tenant, ...] = ()
) -> Workload:
    return workload({config.name: subject(config, registry)}, [cards["h100-sxm"]], tenants=tenants)


def test_what_does_not_fit_is_out_with_the_reason_of_sizing(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(), registry), [cards["h100-sxm"]])
    small = on(found, "1g.10gb")
    assert (small.option, small.breaks) == (None, "memory")
    assert "weights of" in small.reason
    assert on(found, "2g.20gb").option is not None


def test_larger_slices_serve_more_within_the_same_latencies(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(demand=DEMAND, slo={"itl": "30ms"}), registry), [cards["h100-sxm"]])
    capacities = [c.option.capacity for c in found if c.option]
    assert capacities == sorted(capacities)
    assert len(capacities) == 5
    for candidate in found:
        if candidate.option:
            assert candidate.speed is not None
            assert candidate.speed.itl_seconds <= 0.030


def test_a_place_that_is_too_slow_says_by_how_much(registry: Registry, cards: dict[str, Card]) -> None:
    slow = on(
        candidates(subject(qwen8b(demand=DEMAND, slo={"itl": "12ms"}), registry), [cards["a100-80gb"]]), "2g.20gb"
    )
    assert slow.breaks == "speed"
    assert "12 ms allowed" in slow.reason


def test_the_whole_card_is_an_option_only_where_slices_will_not_do(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(), registry), [cards["h100-sxm"]])
    assert on(found, "gpu").breaks == "mode"
    wanted = candidates(subject(qwen8b(profiles=["gpu"]), registry), [cards["h100-sxm"]])
    assert [c.place.profile for c in wanted if c.option] == ["gpu"]
    plain = Card("L40S", None, 44 * 2**30)
    assert [c.place.profile for c in candidates(subject(qwen8b(), registry), [plain]) if c.option] == ["gpu"]


def test_only_accepted_profiles_are_options(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(profiles=["2g.20gb", "3g.40gb"]), registry), [cards["h100-sxm"]])
    assert [c.place.profile for c in found if c.option] == ["2g.20gb", "3g.40gb"]
    assert whole_card(subject(qwen8b(profile="2g.20gb"), registry), cards["h100-sxm"]).option is not None


def test_cards_whose_memory_or_speed_nobody_has_published(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(demand=DEMAND), registry), [cards["h20"], Card("L40S", None, 44 * 2**30)])
    assert "published its memory" in on(found, "1g.24gb").reason
    assert "name `replicas` instead of a demand" in found[-1].reason


def test_a_fixed_number_of_replicas_must_be_able_to_bear_the_demand(registry: Registry, cards: dict[str, Card]) -> None:
    found = candidates(subject(qwen8b(demand=DEMAND, replicas=2), registry), [cards["h100-sxm"]])
    assert on(found, "2g.20gb").breaks == "speed"
    assert "2 replicas would have to serve 3.00 requests per second each" in on(found, "2g.20gb").reason
    assert on(found, "7g.80gb").option is not None


def test_what_an_engine_measured_counts_instead_of_the_estimate(registry: Registry, cards: dict[str, Card]) -> None:
    chat = subject(qwen8b(), registry)
    memory = on(candidates(chat, [cards["h100-sxm"]]), "2g.20gb").place.memory_bytes
    assert memory is not None
    key = CalibrationKey.of("org/chat", memory, chat.limits)
    heavy = Calibration(key, 2**34, memory, 0, 0, None, {})
    assert on(candidates(chat, [cards["h100-sxm"]], Measured({key: heavy})), "2g.20gb").option is None
    assert on(candidates(chat, [cards["h100-sxm"]], Measured({key: heavy})), "3g.40gb").option is not None


def throughput(prompt_tokens: int, profile: str | None, **slo: float) -> Throughput:
    key = ThroughputKey("org/chat", "mig", profile, "H100-80GB-SXM", None, prompt_tokens, 200, slo)
    return Throughput(key, "chat", 3.25, 3.5, 650.0, 2600.0, 0.99, 0.4, 0.02, "2026-11-21T00:00:00Z")


def test_a_measured_throughput_counts_instead_of_the_roofline(registry: Registry, cards: dict[str, Card]) -> None:
    chat = subject(qwen8b(demand=DEMAND, slo={"itl": "30ms"}), registry)

    def capacity(*records: Throughput) -> float:
        found = on(candidates(chat, [cards["h100-sxm"]], Measured(throughput=records)), "2g.20gb")
        assert found.option is not None
        return found.option.capacity

    estimate = capacity()
    assert capacity(throughput(820, "2g.20gb", itl_seconds=0.03)) == 3.25
    assert capacity(throughput(820, "3g.40gb", itl_seconds=0.03)) == estimate, "another slice"
    assert capacity(throughput(2000, "2g.20gb", itl_seconds=0.03)) == estimate, "other requests"
    assert capacity(throughput(820, "2g.20gb", itl_seconds=0.05)) == estimate, "an easier SLO"
    assert capacity(throughput(820, "2g.20gb", ttft_seconds=0.5)) == estimate, "no limit on ITL"


def test_a_load_that_too_few_requests_bore_is_not_counted_with(registry: Registry, cards: dict[str, Card]) -> None:
    some = replace(throughput(820, "2g.20gb", itl_seconds=0.03), attainment=0.95)

    def capacity(**slo: object) -> Candidate:
        chat = subject(qwen8b(demand=DEMAND, slo={"itl": "30ms"} | slo), registry)
        return on(candidates(chat, [cards["h100-sxm"]], Measured(throughput=(some,))), "2g.20gb")

    for asked, counts in ((0.95, True), (0.9, True), (0.96, False), (0.99, False)):
        assert capacity(attainment=asked).measured is counts, asked
    assert not capacity().measured, "99% of requests, unless the model says otherwise"
    judged = Measured(throughput=(some,)).judged(
        "org/chat", Where("H100-80GB-SXM", "2g.20gb"), Demand(6.0, 800, 200, itl_slo_seconds=0.03)
    )
    assert (
        "95.0% of the requests met it, the model's SLO is for 0.99: measure with --attainment 0.99" in judged.ignored[0]
    )


def test_changes_that_are_proposed_really_open_a_place(registry: Registry, cards: dict[str, Card]) -> None:
    tight = subject(qwen8b(max_model_len=40960, max_num_seqs=4), registry)
    found = candidates(tight, [cards["h100-sxm"]])
    told = alternatives(tight, [cards["h100-sxm"]], found)
    shorter = next(a for a in told if a.change.startswith("max_model_len"))
    again = subject(qwen8b(max_model_len=int(shorter.change.split(": ")[1]), max_num_seqs=4), registry)
    assert on(candidates(again, [cards["h100-sxm"]]), shorter.option.profile).option is not None
    assert on(found, shorter.option.profile).option is None


def test_a_later_slo_is_proposed_where_the_slo_is_what_is_in_the_way(
    registry: Registry, cards: dict[str, Card]
) -> None:
    hasty = subject(qwen8b(demand=DEMAND, slo={"itl": "2ms"}), registry)
    found = candidates(hasty, [cards["h100-sxm"]])
    assert not any(c.option for c in found)
    later = [a for a in alternatives(hasty, [cards["h100-sxm"]], found) if a.change.startswith("slo")]
    assert [a.option.profile for a in later] == ["7g.80gb"]


def test_demands_are_rates_numbers_or_ranges(registry: Registry, cards: dict[str, Card]) -> None:
    (rate,) = asked(qwen8b(demand=DEMAND, replicas={"min": 2, "max": 5}), registry, cards).demands
    assert (rate.rate, rate.replicas, rate.min_replicas, rate.max_replicas) == (6.0, None, 2, 5)
    (number,) = asked(qwen8b(replicas=3, priority=7, spread="nodes"), registry, cards).demands
    assert (number.rate, number.replicas, number.priority) == (None, 3, 7)
    assert (number.max_per_gpu, number.max_per_node) == (1, 1)
    assert asked(qwen8b(replicas=0), registry, cards).demands == ()


def test_a_number_that_autoscaling_decided_on_stays_within_the_bounds(
    registry: Registry, cards: dict[str, Card]
) -> None:
    chat = subject(qwen8b(demand=DEMAND, replicas={"min": 1, "max": 3}), registry)
    for desired, expected in ((0, 1), (2, 2), (9, 3)):
        (demand,) = workload({"chat": chat}, [cards["h100-sxm"]], desired={"chat": desired}).demands
        assert demand.replicas == expected


def test_a_dedicated_tenant_has_replicas_of_its_own(registry: Registry, cards: dict[str, Card]) -> None:
    tenants = (Tenant("acme", dedicated=True, rates={"chat": 2.0}), Tenant("globex"), Tenant("initech", ("other",)))
    demands = {d.name: d for d in asked(qwen8b(demand=DEMAND), registry, cards, tenants).demands}
    assert {n: (d.tenant, d.rate) for n, d in demands.items()} == {
        "chat@acme": ("acme", pytest.approx(2.0)),
        "chat": (None, pytest.approx(4.0)),
    }


def test_a_dedicated_tenant_that_is_the_only_user_leaves_nothing_to_share(
    registry: Registry, cards: dict[str, Card]
) -> None:
    (demand,) = asked(qwen8b(), registry, cards, (Tenant("acme", dedicated=True),)).demands
    assert (demand.name, demand.model, demand.tenant) == ("chat@acme", "chat", "acme")


@pytest.mark.parametrize(
    ("rates", "shares"),
    [
        (({}, {}), {"a": 0.5, "b": 0.5}),
        (({"chat": 1.5}, {}), {"a": 0.25, "b": 0.75}),
        (({"chat": 1.0}, {"chat": 2.0}), {"a": 1 / 3, "b": 2 / 3}),
    ],
)
def test_shares_of_tenants_sum_to_one(rates: tuple[dict[str, float], ...], shares: dict[str, float]) -> None:
    tenants = [Tenant(name, rates=rate) for name, rate in zip("ab", rates, strict=True)]
    assert tenant_shares(qwen8b(demand=DEMAND), tenants) == pytest.approx(shares)


def test_models_that_cannot_be_read_are_told_and_take_nothing_from_the_others(registry: Registry) -> None:
    missing = ModelConfig(name="gone", source="./nowhere")
    found = read_subjects([missing, qwen8b()], registry)
    assert set(found.models) == {"chat"}
    assert not isinstance(found.unreadable["gone"], PlacementError)


def test_another_engine_is_taken_to_know_for_itself(cards: dict[str, Card]) -> None:
    registry = ModelRegistry(EngineConfig(command=("serve", "{model}")), environ={})
    found = read_subjects([ModelConfig(name="toy", source="./nowhere")], registry)
    demands = workload(found.models, [cards["a30"]]).demands
    assert [o.profile for o in demands[0].options] == ["1g.6gb", "2g.12gb", "4g.24gb", "gpu"]


def test_why_a_model_runs_nowhere_is_told_of_the_nearest_place(registry: Registry, cards: dict[str, Card]) -> None:
    large = model("large", "meta-llama--Llama-3.3-70B-Instruct", quantization="fp8")
    choices = workload({"large": subject(large, registry)}, [cards["a30"]]).models["large"]
    assert choices.blocked is not None
    assert "weights of" in choices.blocked
    assert workload({"chat": subject(qwen8b(), registry)}, [cards["h200"]]).models["chat"].blocked is None
