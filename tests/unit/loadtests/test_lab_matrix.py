"""Which settings there are on a machine, and in which order they are measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loadtests.aggressors import CpuHog, WeightLoading, parse_cores
from loadtests.commands.base import check_writable
from loadtests.hogs import command_of, running
from loadtests.lab.matrix import cells_of, phases
from loadtests.lab.scenario import Context, IsolationScenario, check_host, check_tenants, keys_from, read_isolation
from loadtests.machine import usable_cores
from loadtests.problems import LoadTestError, ScenarioError
from loadtests.yamlfile import Source, load


def row(model: str, slice_id: str, gpu: str | None = None, kind: str = "mig", state: str = "ready") -> dict[str, Any]:
    return {"model": model, "state": state, "slice": {"id": slice_id, "kind": kind, "gpu": gpu}}


ROWS = [
    row("chat", "g0/1", "GPU-0"),
    row("far", "g1/1", "GPU-1"),
    row("late", "g0/3", "GPU-0", state="starting"),
    row("near", "g0/2", "GPU-0"),
]
HOG = {"kind": "cpu_hog"}
NOISY = {"kind": "prefill_flood", "tenant": "noisy"}
EMBEDS = {"name": "quiet", "model": "embed", "task": "embedding"}
ALL = [{"where": "same_slice"}, {"where": "other_slice"}, {"where": "other_gpu"}]


def data_of(**fields: Any) -> dict[str, Any]:
    return {
        "kind": "isolation",
        "base_url": "http://127.0.0.1:1",
        "victim": {"name": "quiet", "model": "chat"},
        "aggressors": [NOISY],
        "settings": ALL,
    } | fields


def scenario_of(**fields: Any) -> IsolationScenario:
    return read_isolation(Source(data_of(**fields), "s.yaml"))


def cells(scenario: IsolationScenario, rows: Any = ROWS, context: Context | None = None) -> Any:
    return cells_of(scenario, rows, lambda model, tenant: 1000, context or Context())


def test_places_are_found_from_what_runs() -> None:
    found = {cell.key: cell for cell in cells(scenario_of())}
    models = {key: cell.beside.model for key, cell in found.items() if cell.beside}
    assert models == {
        "prefill_flood_on_same_slice": "chat",
        "prefill_flood_on_other_slice": "near",
        "prefill_flood_on_other_gpu": "far",
    }
    assert found["prefill_flood_on_other_slice"].kind == "mig"
    assert next(iter(found)) == "alone"


def test_rounds_are_mirrored_and_ask_the_same_in_every_setting() -> None:
    scenario = scenario_of(rounds=2, seed=5)
    order = list(phases(scenario, cells(scenario), "http://127.0.0.1:1"))
    keys = [phase.cell.key for phase in order]
    assert keys[:4] == list(reversed(keys[4:]))
    assert [phase.scenario.seed for phase in order] == [5] * 4 + [6] * 4
    assert len({phase.scenario.wording for phase in order}) == 8, (
        "a setting would find the prompts of another in the cache"
    )
    assert {phase.scenario.tenants[0] for phase in order} == {scenario.victim}
    assert all(t.background == (t.name == "noisy") for p in order for t in p.scenario.tenants)


def test_well_behaved_others_are_there_in_every_setting() -> None:
    scenario = scenario_of(others=[{"name": "calm", "model": "near"}])
    for phase in phases(scenario, cells(scenario), "http://127.0.0.1:1"):
        assert [t.name for t in phase.scenario.tenants[:2]] == ["quiet", "calm"]


@pytest.mark.parametrize(
    ("kind", "prompt", "output", "users"),
    [
        ("prefill_flood", 750, 1, 8),
        ("decode_flood", None, 250, 16),
        ("long_context", 700, 250, 8),
        ("cancel_storm", 100, 250, 16),
        ("slow_readers", None, 250, 16),
    ],
)
def test_aggressors_are_sized_by_the_models_context(kind: str, prompt: int | None, output: int, users: int) -> None:
    load = cells(scenario_of(aggressors=[{"kind": kind, "tenant": "noisy"}]))[1].beside
    assert (load.prompt_tokens and load.prompt_tokens.value, load.output_tokens.value, load.arrival.users) == (
        prompt,
        output,
        users,
    )


def test_manners_are_the_kinds() -> None:
    kinds = {"cancel_storm": "cancel", "slow_readers": "slow_reader", "connection_flood": "hold_open"}
    for kind, manner in kinds.items():
        assert cells(scenario_of(aggressors=[{"kind": kind, "tenant": "noisy"}]))[1].beside.manner.kind == manner


def test_a_hog_takes_the_cores_that_the_setting_names() -> None:
    settings = [{"where": "same_cores"}, {"where": "other_cores", "cores": "6-7"}, {"where": "machine"}]
    scenario = scenario_of(aggressors=[HOG], settings=settings)
    context = Context(slice_cores={"g0/1": "0-1", "g0/2": "2"})
    assert [c.cores for c in cells(scenario, context=context)] == [None, (0, 1), (6, 7), None]
    with pytest.raises(ScenarioError, match="nobody knows which cores"):
        cells(scenario)


def test_weights_are_loaded_on_the_interpreter_that_has_pytorch() -> None:
    here, _ = command_of(WeightLoading(path=Path("w")), (1, 2))
    assert here[2:] == ["weights", "--path", "w", "--cores", "1,2"]
    there, environment = command_of(WeightLoading(path=Path("w"), device="MIG-1", interpreter=Path("/e/python")), None)
    assert there[0] == "/e/python"
    assert there[-1] == "--cuda"
    assert environment["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    assert "--memory-mib" in command_of(CpuHog(), None)[0]


def test_what_is_not_to_be_had_is_told_with_what_is() -> None:
    with pytest.raises(ScenarioError, match="no model runs on another GPU") as caught:
        cells(scenario_of(), [r for r in ROWS if r["model"] != "far"])
    assert "chat on g0/1; near on g0/2. Serve a second model" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"aggressors": []}, "aggressors"),
        ({"aggressors": [NOISY, NOISY]}, "share a name"),
        ({"aggressors": [{"kind": "prefil_flood", "tenant": "n"}]}, "prefill_flood"),
        ({"aggressors": [HOG]}, "no setting fits 'cpu_hog'"),
        (
            {"base_url": None, "deployments": [{"name": "a", "fake_engines": {}}, {"name": "a", "fake_engines": {}}]},
            "two deployments share a name",
        ),
        ({"aggressors": [{"kind": "prefill_flood"}]}, "'tenant' is missing"),
        ({"settings": [{"where": "next_door"}]}, "same_slice"),
        ({"settings": [{"where": "same_cores", "cores": "3-1"}]}, "no list of cores"),
        ({"config": "x.yaml"}, "one of config, base_url"),
        ({"deployments": [{"name": "a"}], "base_url": None}, "one of config, base_url and fake_engines"),
        ({"victim": {"name": "quiet", "model": "chat", "background": True}}, "background"),
        ({"budget": {"p99_ratios": 1.1}}, "Did you mean 'p99_ratio'?"),
        ({"round": 3}, "Did you mean 'rounds'?"),
        ({"aggressors": [NOISY | {"tenant": "quiet"}]}, "'quiet' cannot be its own neighbour"),
        ({"others": [{"name": "noisy", "model": "chat"}]}, "'noisy' cannot be its own neighbour"),
        ({"others": [{"name": "quiet", "model": "near"}]}, "'quiet' is there twice"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds: must be a finite number"),
        ({"budget": {"p99_ratio": float("inf")}}, "budget.p99_ratio: must be a finite number"),
        ({"settings": [{"where": "same_cores", "cores": "0-99999999999"}]}, "no machine has a core 99999999999"),
        (
            {"victim": EMBEDS, "budget": {"p99_ratio": 1.1, "metrics": ["e2e", "ttft"]}},
            "the victim's answers come in one piece and have no ttft",
        ),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario_of(**fields)
    assert said in str(caught.value)


def test_an_unknown_tenant_is_told_with_its_line_and_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "kind: isolation\nvictim: {name: quiet, model: chat}\naggressors:\n  - kind: flood\n    tenant: nosy\n"
        "settings: [{where: same_slice}]\n",
        encoding="utf-8",
    )
    source = load(path)
    scenario = read_isolation(source)
    check_tenants(scenario, Context(), source)
    with pytest.raises(ScenarioError) as caught:
        check_tenants(scenario, Context(tenants=("quiet", "noisy")), source)
    assert str(caught.value).startswith(f"{path}:5: aggressors[0].tenant: there is no tenant 'nosy'")
    assert "'noisy'" in str(caught.value)


def test_a_run_too_short_for_its_percentile_says_how_long_it_must_be() -> None:
    victim = {"name": "quiet", "model": "chat", "arrival": {"kind": "poisson", "requests_per_second": 2}}
    fields = {"victim": victim, "duration_seconds": 10, "rounds": 2, "budget": {"p99_ratio": 1.1}}
    with pytest.raises(ScenarioError, match="about 40 requests per setting, and p99 takes 100") as caught:
        scenario_of(**fields)
    assert "Set duration_seconds to 25 or more" in str(caught.value)
    assert scenario_of(**fields | {"duration_seconds": 25}).rounds == 2
    with pytest.raises(ScenarioError, match=r"p99\.9 takes 1000"):
        scenario_of(**fields | {"duration_seconds": 25, "budget": {"p999_ratio": 2}})


def test_keys_come_from_the_context_or_the_environment() -> None:
    scenario = scenario_of(aggressors=[NOISY | {"api_key_env": "NOISY_KEY"}])
    context = Context(keys={"quiet": "sk-q"})
    assert keys_from(scenario, context, {"NOISY_KEY": "sk-n"}) == {"quiet": "sk-q", "noisy": "sk-n"}
    with pytest.raises(ScenarioError, match="NOISY_KEY"):
        keys_from(scenario, context, {})


def test_paths_are_relative_to_the_scenario(tmp_path: Path) -> None:
    hog = {"kind": "weight_loading", "path": "weights"}
    data = data_of(base_url=None, config="../c.yaml", aggressors=[hog], settings=[{"where": "machine"}])
    found = read_isolation(Source(data, "s.yaml", directory=tmp_path))
    assert found.config == tmp_path / "../c.yaml"
    assert found.aggressors[0].path == tmp_path / "weights"  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "cores"), [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("4,4", (4,))])
def test_cores_are_read_as_linux_writes_them(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "a budget without a limit"),
        ({"metrics": ["ttft"]}, "a budget without a limit"),
        (
            {"p99_ratio": 1.1, "settings": ["other_gpu"]},
            "the budget is about other_gpu, and no setting is one of these",
        ),
    ],
)
def test_a_budget_that_could_judge_nothing_is_refused_before_the_run(budget: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        scenario_of(budget=budget, settings=[{"where": "same_slice"}])
    assert scenario_of(budget={"failed_ratio": 0.01}).budget is not None
    assert scenario_of(victim=EMBEDS, budget={"p99_ratio": 1.1}).budget is not None, "unnamed: judged by what there is"


def test_results_that_could_not_be_written_are_told_before_the_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    check_writable(samples=file, report=tmp_path / "made" / "here")
    assert file.read_text(encoding="utf-8") == "kept"
    with pytest.raises(ScenarioError, match=r"--report .*/file: nothing can be written there"):
        check_writable(report=file)
    with pytest.raises(
        ScenarioError, match=r"--samples .*/absent/s\.jsonl: nothing can be written there: No such file"
    ):
        check_writable(samples=tmp_path / "absent" / "s.jsonl")
    with pytest.raises(ScenarioError, match="Name a file"):
        check_writable(samples=tmp_path)


def test_weights_and_cores_that_are_not_there_are_told_before_the_run(tmp_path: Path) -> None:
    weights = tmp_path / "model"
    loading = {"kind": "weight_loading", "path": str(weights)}
    settings = [{"where": "same_cores", "cores": "0-2"}, {"where": "machine"}]

    def faults() -> list[str]:
        source = Source(data_of(aggressors=[loading, HOG | {"cores": "1"}], settings=settings), "s.yaml")
        try:
            check_host(read_isolation(source), source, {0, 1})
        except ScenarioError as error:
            return [str(problem) for problem in error.problems]
        return []

    assert [told.splitlines()[0] for told in faults()] == [
        f"s.yaml: aggressors[0].path: {weights} is not there",
        "s.yaml: settings[0].cores: this machine has no core 2",
    ]
    weights.mkdir()
    assert "has no *.safetensors" in faults()[0]
    (weights / "model.safetensors").write_bytes(b"x")
    settings[0]["cores"] = "0-1"
    assert faults() == []


def test_weights_that_never_come_are_told_in_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    with (
        pytest.raises(LoadTestError, match=r"weight_loading: a process was not at work within 0\.2 s"),
        running(WeightLoading(path=tmp_path), None, at_work_seconds=0.2),
    ):
        raise AssertionError("nothing is measured")


def test_cores_can_be_used_whatever_the_affinity_of_who_asks() -> None:
    every, before = usable_cores(), os.sched_getaffinity(0)
    assert every >= before
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == every
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_a_hog_is_at_work_before_anything_is_measured_beside_it(tmp_path: Path) -> None:
    with running(CpuHog(memory_mib=0, processes=2), None):
        pass
    entered = []
    with (
        pytest.raises(LoadTestError, match="nothing disturbed the victim"),
        running(WeightLoading(path=tmp_path), None),
    ):
        entered.append(True)
    assert entered == []
