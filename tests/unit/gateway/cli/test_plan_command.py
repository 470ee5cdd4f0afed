"""`plan` and `capacity` as an operator types them: what demands make of a fleet, why, and what it costs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.config import load_config
from gateway.layouts import machine_of
from gateway.planning import answer, reservations
from model_registry.errors import ConfigError, SlicewayError, UnknownProduct
from placement.changeover import Changeover, Replacement
from placement.errors import PlacementError, StalePlan, TransitionBlocked
from placement.nvml.partition import NvmlPartitioner
from placement.partition import apply as apply_layouts
from placement.partition import plan as plan_layouts
from placement.partition.rules import LayoutRule
from placement.schema import SimulatedFleet
from placement.simulate import machine_directory
from placement.simulator import Simulation
from placement.transition import Step

MODELS = Path(__file__).parents[4] / "configs" / "examples" / "models"
CHAT = f"""
models:
  - name: chat
    source: Qwen/Qwen3-8B
    metadata: {MODELS}/Qwen--Qwen3-8B.json
    max_model_len: 8192
    max_num_seqs: 32
    demand: {{requests_per_second: 4, prompt_tokens: 800, output_tokens: 200}}
    slo: {{ttft: 1s, itl: 40ms}}
"""
SMALL = f"""  - name: small
    source: Qwen/Qwen3-0.6B
    metadata: {MODELS}/Qwen--Qwen3-0.6B.json
    max_model_len: 4096
    replicas: 2
"""
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def simulator(simulator_binding: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML is the simulator's, and the environment is put back."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    monkeypatch.setenv("SLICEWAY_NVML_STATE", "")
    monkeypatch.delenv("SLICEWAY_NVML_PRIVILEGE", raising=False)
    monkeypatch.setattr("gateway.layouts.NvmlPartitioner", lambda: NvmlPartitioner(simulator_binding))


@pytest.fixture
def config(tmp_path: Path) -> Write:
    """Writes a configuration: `config(fleet="...", rest="...")`."""

    def write(fleet: str = "partition: planned", rest: str = CHAT, discover: str = "{simulate: {h100-sxm: 2}}") -> Path:
        path = tmp_path / "sliceway.yaml"
        path.write_text(
            f"version: v1\nstate_dir: {tmp_path}/state\nfleet:\n  discover: {discover}\n  {fleet}\n{rest}\n",
            encoding="utf-8",
        )
        return path

    return write


def run(*words: Any, code: int = 0) -> Any:
    """What the command printed; it must end with `code`."""
    done = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "160"})
    if isinstance(done.exception, SlicewayError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def told(*words: Any, code: int = 0) -> Any:
    return json.loads(run(*words, "--json", code=code).stdout)


def test_the_plan_shows_what_is_made_for_whom_and_in_which_order(config: Write) -> None:
    shown = run("plan", config(rest=CHAT + SMALL)).stdout
    assert "+ 3g.40gb@4 chat-0" in shown
    assert "+ 1g.10gb@" in shown
    assert "nothing cheaper exists" in shown
    assert "steps, about" in shown
    assert "counted for a start: chat 3 s (simulated)" in shown
    assert shown.index("create GPU") < shown.index("start chat-0")


def test_the_json_has_the_plan_its_reasons_and_its_steps(config: Write) -> None:
    plan = told("plan", config())
    assert (plan["changes"], plan["blocked"], plan["simulated"]) == (True, False, True)
    fleet = plan["fleet"]
    assert (fleet["met"], fleet["changed"], fleet["unmet"]) == (True, True, [])
    assert [d["subject"] for d in fleet["decisions"]] == ["chat-0"]
    assert [s["action"] for s in fleet["transition"]["steps"]] == ["create", "start", "check"]
    (chat,) = fleet["transition"]["models"]
    assert (chat["start_source"], chat["start_seconds"]) == ("simulated", 3.0)
    assert fleet["transition"]["seconds"] == 1 + 3 + 1
    feasible = {p["profile"] for p in fleet["models"]["chat"] if p["feasible"]}
    assert "1g.10gb" not in feasible
    assert "3g.40gb" in feasible


def test_the_plan_says_how_many_engines_come_also_those_of_a_dedicated_tenant(config: Write) -> None:
    tenants = "tenants: [{name: acme, models: all, isolation: dedicated}, {name: globex, models: all}]"
    one = CHAT.replace("demand: {requests_per_second: 4, prompt_tokens: 800, output_tokens: 200}", "replicas: 1")
    path = config(rest=one.replace("    slo: {ttft: 1s, itl: 40ms}\n", "") + tenants)
    shown = run("plan", path).stdout
    assert "chat@acme-0" in shown
    assert "starts 2\n" in shown
    replicas = told("plan", path)["replicas"]
    assert replicas["missing"] == ["chat-0", "chat@acme-0"], "as the plan calls them"
    unread = config(rest=CHAT.replace("Qwen--Qwen3-8B", "nowhere"))
    assert told("plan", unread)["replicas"]["missing"] == ["chat-0"]
    shown = run("plan", unread).stdout
    assert "starts 0, without what finds no slice" in shown
    assert "nowhere.json: there is no such file" in shown


def test_replicas_that_another_configuration_seated_in_the_state_directory_are_not_missing(config: Write) -> None:
    run("apply", config(rest=CHAT))
    assert told("plan", config(rest=CHAT))["replicas"]["missing"] == ["chat-0"], "seated, and nobody runs it"
    other = config(rest=SMALL.replace("  - name", "models:\n  - name"))
    names = {d["subject"] for d in told("plan", other)["fleet"]["decisions"] if d["action"] != "stop"}
    assert told("plan", other)["replicas"]["missing"] == sorted(names)
    assert not told("assert", other, code=1)["replicas"]["same"]


def test_why_prints_every_place_and_what_would_help(config: Write) -> None:
    shown = run("plan", config(), "--why", "chat").stdout
    assert "add chat-0 3g.40gb" in shown
    assert "weights of 15.27 GiB exceed" in shown
    with pytest.raises(ConfigError, match="--why: the plan knows no model 'chta'"):
        run("plan", config(), "--why", "chta")
    with pytest.raises(SlicewayError, match="--simulate: 'h100' could be any of"):
        run("plan", config(), "--simulate", "h100:2")
    with pytest.raises(ConfigError, match=r"fleet\.cordon: there is no GPU 7"):
        run("plan", config(fleet="cordon: [7]"))


def test_apply_carries_the_plan_out_and_a_second_time_there_is_nothing_to_do(config: Write) -> None:
    path = config(rest=CHAT + SMALL)
    everything = told("apply", path)
    assert (everything["changed"], everything["simulated"]) == (True, True)
    applied = everything["fleet"]
    assert applied["ok"]
    assert {s["action"] for s in applied["done"]} == {"create", "seat"}, (
        "nobody runs engines, so none is started or checked"
    )
    assert told("apply", path)["fleet"]["done"] == []
    again = told("plan", path)["fleet"]
    assert (again["changed"], again["transition"]["steps"]) == (False, [])
    assert told("plan", path)["changes"] is False
    assert "nothing to do" in run("apply", path).stdout
    more = config(rest=CHAT.replace("requests_per_second: 4", "requests_per_second: 12") + SMALL)
    shown = run("apply", more).stdout
    assert "create GPU" in shown
    assert "no engine was started: no controller runs" in shown


@pytest.mark.parametrize(("mig", "needed"), [("true", True), ("false", False)])
def test_the_plan_says_where_a_cards_mode_has_to_change(config: Write, mig: str, needed: bool) -> None:
    rest = CHAT.replace("    demand:", "    profiles: [gpu]\n    demand:")
    shown = run("plan", config(rest=rest, discover=f"{{simulate: {{h100-sxm: 1}}, mig: {mig}}}")).stdout
    assert "set GPU 0 to MIG off" in shown
    assert "then whole card, MIG off" in shown
    assert ("needs --allow-mode-change" in shown) is needed


def test_a_model_that_is_to_have_less_is_not_told_as_one_without_a_dip(config: Write) -> None:
    told("apply", config(rest=CHAT + SMALL))
    fewer = config(rest=CHAT + SMALL.replace("replicas: 2", "replicas: 1"))
    shown = run("plan", fewer).stdout
    assert next(line for line in shown.splitlines() if line.startswith("small")).rstrip().endswith("2 to 1")


def test_an_apply_that_would_break_a_promise_is_refused_unless_allowed(config: Write) -> None:
    rest = CHAT.replace("    demand:", "    profiles: [{profile}]\n    demand:")
    one = "{simulate: {h100-sxm: 1}}"
    whole = config(rest=rest.replace("{profile}", "7g.80gb"), discover=one)
    told("apply", whole)
    halves = config(rest=rest.replace("{profile}", "3g.40gb"), discover=one)
    with pytest.raises(TransitionBlocked, match="chat would serve 0 of the"):
        run("apply", halves)
    assert "no safe order" in run("plan", halves).stdout
    dipping = told("plan", halves, "--allow-dip")["fleet"]["transition"]
    assert dipping["models"][0]["lowest"] == 0
    assert dipping["models"][0]["dip_seconds"] > 0
    assert told("apply", halves, "--allow-dip")["fleet"]["ok"]


def test_a_model_that_rests_is_shown_and_told_where_nothing_would_wake_it(config: Write) -> None:
    rest = CHAT + SMALL.replace("replicas: 2", "replicas: {min: 0, max: 1}")
    shown = run("plan", config(rest=rest)).stdout
    assert "none until a request comes" in shown
    assert "no slice is left free for small" in shown
    assert "repartition: automatic" in shown
    assert "no replica small: min is 0" in run("plan", config(rest=rest), "--why", "small").stdout
    assert told("plan", config(rest=rest))["fleet"]["resting"] == [{"model": "small", "wakes": False}]


@pytest.mark.parametrize(
    "fleet",
    [
        "partition: planned\n  autoscale: {repartition: automatic}",
        "layouts: [{gpus: all, layout: {3g.40gb: 1, 1g.10gb: 1}}]",
    ],
)
def test_a_model_that_rests_can_be_woken_where_a_slice_is_free_or_may_be_cut(config: Write, fleet: str) -> None:
    path = config(fleet=fleet, rest=CHAT + SMALL.replace("replicas: 2", "replicas: {min: 0, max: 1}"))
    told("apply", path, "--layouts-only")
    assert told("plan", path)["fleet"]["resting"] == [{"model": "small", "wakes": True}]
    assert "no slice is left free" not in run("plan", path).stdout


def test_a_whole_card_that_nobody_uses_wakes_a_model_that_rests(config: Write) -> None:
    rest = CHAT + SMALL.replace("replicas: 2", "replicas: {min: 0, max: 1}")
    cards = "{simulate: {h100-sxm: NUMBER}, mig: false}"
    free = config(rest=rest, discover=cards.replace("NUMBER", "2"))
    assert told("plan", free)["fleet"]["resting"] == [{"model": "small", "wakes": True}]
    assert "no slice is left free" not in run("plan", free).stdout
    taken = config(rest=rest, discover=cards.replace("NUMBER", "1"))
    assert told("plan", taken)["fleet"]["resting"] == [{"model": "small", "wakes": False}]


def test_a_configuration_without_demands_is_planned_as_before(config: Write) -> None:
    rest = "models: [{name: chat, source: org/never-read}]"
    assert "fleet" not in told("plan", config(fleet="layouts: []", rest=rest))


def test_demands_are_met_on_the_slices_that_layouts_make(config: Write) -> None:
    path = config(fleet="layouts: [{layout: {3g.40gb: 2}}]")
    shown = told("plan", path)
    assert shown["fleet"]["met"]
    for gpu in shown["fleet"]["gpus"]:
        assert {s["slice"] for s in gpu["slices"]} <= {"3g.40gb@0", "3g.40gb@4"}
        assert gpu["destroyed"] == []


def test_what_cutting_anew_would_add_is_proposed_and_not_done(config: Write) -> None:
    path = config(fleet="cordon: []", discover="{simulate: {h100-sxm: 1}}")
    loaded = load_config(path)
    machine = machine_of(loaded)
    apply_layouts(machine.driver, (LayoutRule.model_validate({"layout": {"1g.10gb": 7}}),))
    fleet = told("plan", path)["fleet"]
    assert not fleet["met"]
    assert fleet["proposal"]["worthwhile"]
    assert "cutting GPUs anew" in run("plan", path).stdout


def test_a_demand_that_no_fleet_can_meet_names_what_would_help(config: Write) -> None:
    greedy = CHAT.replace("requests_per_second: 4", "requests_per_second: 400")
    fleet = told("plan", config(rest=greedy))["fleet"]
    (unmet,) = fleet["unmet"]
    assert unmet["model"] == "chat"
    assert unmet["remedies"]
    assert "not met chat" in run("plan", config(rest=greedy)).stdout


def test_a_model_that_cannot_be_read_takes_nothing_from_the_others(config: Write) -> None:
    fleet = told("plan", config(rest=CHAT + "  - {name: gone, source: ./nowhere}\n"))["fleet"]
    assert set(fleet["unreadable"]) == {"gone"}
    assert [d["subject"] for d in fleet["decisions"]] == ["chat-0"]


def test_reserved_slices_are_shown_with_uuid_and_never_given_away(config: Write) -> None:
    path = config(fleet="reserve: [{4g.40gb: 1, note: fine-tuning}]\n  partition: planned")
    before = told("plan", path)["fleet"]
    step = next(s for s in before["transition"]["steps"] if s["reserved"])
    assert step["reserved"] == "fine-tuning"
    loaded = load_config(path)
    machine = machine_of(loaded)
    gpu = next(g for g in machine.driver.observe() if g.uuid == step["gpu"])
    rule = LayoutRule.model_validate({"gpus": [gpu.uuid], "layout": [step["slice"]]})
    apply_layouts(machine.driver, (rule,))
    reservations(loaded).add(f"{gpu.uuid}/{step['slice']}", "fine-tuning")
    after = told("plan", path)["fleet"]
    assert [(r["note"], r["uuid"][:4]) for r in after["reserved"]] == [("fine-tuning", "MIG-")]
    assert not any(s["reserved"] for s in after["transition"]["steps"]), "made once"
    assert "reserved fine-tuning" in run("plan", path).stdout


def test_a_pin_on_a_cordoned_gpu_is_a_contradiction(config: Write) -> None:
    path = config(fleet="layouts: [{layout: [3g.40gb@0]}]\n  cordon: [0]")
    uuid = machine_of(load_config(path)).driver.observe()[0].uuid
    pinned = CHAT.replace("    demand:", f"    slices: ['{uuid}/3g.40gb@0']\n    demand:")
    with pytest.raises(ConfigError, match="cordoned: nothing new comes there"):
        run("plan", config(fleet="layouts: [{layout: [3g.40gb@0]}]\n  cordon: [0]", rest=pinned))
    with pytest.raises(ConfigError, match="no layout makes that slice"):
        run("plan", config(fleet="layouts: [{layout: [2g.20gb@0]}]", rest=pinned))


def test_planning_what_has_no_gpu_says_so(config: Write) -> None:
    with pytest.raises(ConfigError, match="only GPUs are planned"):
        run("plan", config(discover="cpu"), "--why", "chat")
    assert told("plan", config(discover="cpu", fleet="layouts: []"))["gpus"] == []


def test_equal_questions_have_equal_answers(config: Write) -> None:
    path = config(rest=CHAT + SMALL)
    loaded = load_config(path)
    gpus = plan_layouts(machine_of(loaded).driver.observe(), ())
    first = answer(loaded, gpus)
    turned = loaded.model_copy(update={"models": loaded.models[::-1]})
    assert answer(turned, gpus[::-1]).plan == first.plan


def test_capacity_names_cards_costs_and_whole_cards(config: Write) -> None:
    path = config(rest=CHAT + SMALL + "tenants: [{name: acme}, {name: globex, models: [small]}]")
    found = told(
        "capacity",
        path,
        "--gpu",
        "h100-sxm",
        "--gpu",
        "a100-80gb",
        "--price",
        "h100-sxm=2.5",
        "--price",
        "a100-80gb=1.5",
    )
    assert found["optimal"]
    assert found["meets_all"]
    assert found["cost_per_hour"] <= min(o["cost_per_hour"] for o in found["options"])
    assert sum(m["cost_per_hour"] for m in found["models"]) == pytest.approx(found["cost_per_hour"])
    assert sum(t["cost_per_hour"] for t in found["tenants"]) == pytest.approx(found["cost_per_hour"])
    assert found["whole_cards_cost_per_hour"] > found["cost_per_hour"]
    assert {m["model"] for m in found["models"]} == {"chat", "small"}


def test_a_gpu_of_a_planned_fleet_that_holds_nothing_is_for_plans(config: Write) -> None:
    path = config()
    run("apply", path)
    shown = run("slices", path).stdout
    assert "GPU 1 has MIG on and no usable instance" in shown
    assert "shows what a plan would make there" in shown
    assert "fleet.layouts" not in shown


def test_capacity_draws_its_comparison(config: Write, tmp_path: Path) -> None:
    picture = tmp_path / "cost.svg"
    shown = run("capacity", config(), "--gpu", "h100-sxm", "--gpu", "a100-80gb", "--chart", picture).stdout
    assert "whole cards per model" in shown
    assert "█" in shown
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    assert any("whole cards per model" in str(e.text) for e in root.iter())
    ways = [str(e.text) for e in root.iter() if " x " in str(e.text)]
    assert len(ways) == len(set(ways))
    assert str(picture) in shown
    with pytest.raises(ConfigError, match="SVG") as refused:
        run("capacity", config(), "--gpu", "h100-sxm", "--chart", tmp_path / "cost.png")
    assert refused.value.where == "--chart"
    absent = tmp_path / "nowhere" / "cost.svg"
    with pytest.raises(ConfigError, match="there is no directory"):
        run("capacity", config(), "--gpu", "h100-sxm", "--chart", absent)
    assert not absent.parent.exists()
    folder = tmp_path / "cost.svg.svg"
    folder.mkdir()
    with pytest.raises(ConfigError, match="this is a directory"):
        run("capacity", config(), "--gpu", "h100-sxm", "--chart", folder)


def test_a_price_of_a_card_that_nobody_asked_about_is_told(config: Write) -> None:
    words = ("capacity", config(), "--gpu", "h100-sxm", "--price", "h100-sxm=2.5", "--price", "a30=0.5")
    assert "--price A30-24GB: no such card was asked about (--gpu)" in run(*words).stderr
    assert told(*words)["unused_prices"] == ["A30-24GB"]
    assert told(*words)["prices"] == {"H100-80GB-SXM": 2.5}


def test_what_cannot_be_told_of_engines_is_said_once(config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> Changeover:
        raise PlacementError("no engine's journal can be read")

    monkeypatch.setattr("gateway.cli.plan.engine_changes", unknown)
    fleet = "layouts: [{layout: {3g.40gb: 2}}]"
    done = run("apply", config(fleet=fleet, rest=SMALL.replace("  - name", "models:\n  - name")))
    assert done.stderr.count("which engines are replaced cannot be told") == 1


def test_a_price_that_nobody_named_is_told_where_others_are_named(config: Write) -> None:
    words = ("capacity", config(fleet="prices: {a100-80gb: 1.5}"), "--gpu", "h100-sxm", "--gpu", "a100-80gb")
    assert "H100-80GB-SXM has no price: counted at 1.50" in run(*words).stdout
    assert told(*words)["assumed_prices"] == ["H100-80GB-SXM"]
    named = (*words, "--price", "h100-sxm=2.5")
    assert "has no price" not in run(*named).stdout
    assert (told(*named)["assumed_prices"], told(*named)["prices"]["A100-80GB"]) == ([], 1.5)


# ---- plans that have been looked at


def reviewed(config: Write, tmp_path: Path, **written: str) -> tuple[Path, Path]:
    """A configuration, and the file with its plan."""
    path, file = config(**written), tmp_path / "plan.json"
    file.write_text(run("plan", path, "--json").stdout, encoding="utf-8")
    return path, file


def machine(tmp_path: Path) -> Simulation:
    return Simulation.open(machine_directory(SimulatedFleet(simulate={"h100-sxm": 2}), tmp_path / "state"))


def test_a_plan_that_was_looked_at_is_carried_out_once(config: Write, tmp_path: Path) -> None:
    path, file = reviewed(config, tmp_path)
    assert told("apply", path, "--plan", file)["fleet"]["ok"]
    with pytest.raises(StalePlan, match=r"GPU GPU-\S+ has changed") as refused:
        run("apply", path, "--plan", file)
    assert (refused.value.where, "sliceway plan" in str(refused.value.remedy)) == (str(file), True)


def test_a_plan_is_refused_when_a_gpu_has_vanished_since(config: Write, tmp_path: Path) -> None:
    for fleet in ("partition: planned", "layouts: [{gpus: all, layout: {3g.40gb: 2}}]"):
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        path, file = reviewed(config, tmp_path, fleet=fleet)
        gone = json.loads(file.read_text(encoding="utf-8"))["fleet"]["gpus"][1]["gpu"]
        simulation = machine(tmp_path)
        simulation.lose(next(g.index for g in machine_of(load_config(path)).driver.observe() if g.uuid == gone))
        with pytest.raises(StalePlan, match=f"another state of the fleet: GPU {gone} is gone"):
            run("apply", path, "--plan", file)
        (left,) = machine_of(load_config(path)).driver.observe()
        assert left.instances == ()
        assert "is left out: GPU is lost" in run("plan", path).stdout
        assert "is left out: GPU is lost" in str(told("plan", path)["fleet"]["left_out"])


def test_a_plan_is_refused_when_the_configuration_is_another_one(config: Write, tmp_path: Path) -> None:
    path, file = reviewed(config, tmp_path)
    config(rest=CHAT + SMALL)
    with pytest.raises(StalePlan, match="another plan would be carried out by now"):
        run("apply", path, "--plan", file)
    with pytest.raises(StalePlan, match="another plan would be carried out by now"):
        run("apply", path, "--plan", file, "--layouts-only")
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not what `sliceway plan --json` prints"):
        run("apply", path, "--plan", file)
    with pytest.raises(ConfigError, match="No such file"):
        run("apply", path, "--plan", tmp_path / "missing.json")


def test_a_plan_is_refused_when_engines_would_be_replaced_of_which_it_does_not_tell(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of engines that were changed since: the steps are the same."""
    path, file = reviewed(config, tmp_path)
    one = Replacement("chat-0", "chat", "beside", "s", False, False, "", 1, 0, 0.0, 9.0, 0.0, 9.0, "measured")
    monkeypatch.setattr("gateway.cli.layouts.told_changes", lambda *_, **__: Changeover((one,)))
    with pytest.raises(StalePlan, match="another plan would be carried out by now"):
        run("apply", path, "--plan", file)
    assert not any(g.instances for g in machine_of(load_config(path)).driver.observe())
    file.write_text(run("plan", path, "--json").stdout, encoding="utf-8")
    slower = Changeover((replace(one, seconds=12.0, start_seconds=12.0),))
    monkeypatch.setattr("gateway.cli.layouts.told_changes", lambda *_, **__: slower)
    assert told("apply", path, "--plan", file)["fleet"]["ok"]


def test_a_gpu_that_vanishes_on_the_way_stops_apply_with_what_is_done_and_what_is_not(
    config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(rest=SMALL.replace("  - name", "models:\n  - name") + "    spread: gpus\n")
    steps = told("plan", path)["fleet"]["transition"]["steps"]
    first, last = (next(s["gpu"] for s in order if s["action"] == "create") for order in (steps, steps[::-1]))
    assert first != last, "a replica on each GPU"
    lost = next(g.index for g in machine_of(load_config(path)).driver.observe() if g.uuid == last)
    simulation = machine(tmp_path)

    def lose(step: Step, what: str, _: object) -> None:
        if (what, step.kind, step.place.gpu) == ("begun", "create", last):
            simulation.lose(lost)

    monkeypatch.setattr("gateway.cli.plan.show_step", lose)
    shown = run("apply", path, code=1).stdout
    assert f"stopped at create GPU {lost} " in shown
    assert f"GPU {lost} does not answer any more" in shown
    assert last not in shown, "called as elsewhere"
    done, not_done = shown.partition("Done:")[2].split("Not done:")
    assert f"create GPU {lost}" in not_done
    assert f"create GPU {lost}" not in done
    assert f"create GPU {1 - lost}" in done
    assert f"GPU {lost} is left out" in shown


def test_a_plan_tells_prices_that_nobody_named(config: Write) -> None:
    both, planned = "{simulate: {h100-sxm: 1, a100-80gb: 1}}", "partition: planned\n  prices: {a100-80gb: 1.5%s}"
    words = ("plan", config(fleet=planned % "", discover=both))
    assert "H100-80GB-SXM has no price: counted at 1.50" in run(*words).stdout
    assert told(*words)["fleet"]["assumed_prices"] == {"H100-80GB-SXM": 1.5}
    config(fleet=planned % ", h100-sxm: 2.5", discover=both)
    assert "has no price" not in run(*words).stdout
    assert told(*words)["fleet"]["assumed_prices"] == {}
    config(discover=both)
    assert "has no price" not in run(*words).stdout, "without any prices GPUs are counted"


def test_nothing_to_plan_for_is_wrong_input(config: Write) -> None:
    with pytest.raises(ConfigError, match="no model to plan for"):
        run("capacity", config(rest=""), "--gpu", "h100-sxm")


@pytest.mark.parametrize(("option", "word"), [("--gpu", "h101"), ("--price", "h101=2")])
def test_an_unknown_product_is_refused_with_the_option_that_named_it(config: Write, option: str, word: str) -> None:
    with pytest.raises(UnknownProduct) as refused:
        run("capacity", config(), option, word)
    assert refused.value.where == option


def test_capacity_takes_the_simulated_fleets_products_if_none_is_named(config: Write) -> None:
    assert list(told("capacity", config())["gpus"]) == ["H100-80GB-SXM"]
    with pytest.raises(ConfigError, match="no GPU product was named"):
        run("capacity", config(discover="auto"))


def test_capacity_of_what_no_card_holds_fails_and_says_why(config: Write) -> None:
    large = CHAT.replace("Qwen--Qwen3-8B", "meta-llama--Llama-3.3-70B-Instruct")
    done = run("capacity", config(rest=large), "--gpu", "a30", code=1)
    assert "not served chat" in done.stderr
    assert "weights of" in done.stderr
    assert "none of them serves any of it" in done.stdout
    assert "nothing cheaper exists" not in done.stdout


@pytest.mark.parametrize("price", ["h100-sxm", "h100-sxm=", "h100-sxm=-1", "h100-sxm=lots"])
def test_a_price_that_is_none_is_refused(config: Write, price: str) -> None:
    with pytest.raises(ConfigError, match="is no price"):
        run("capacity", config(), "--gpu", "h100-sxm", "--price", price)


def test_between_full_plans_a_demand_is_placed_online_and_a_second_time_there_is_nothing_to_do(config: Write) -> None:
    run("apply", config())
    was = told("plan", config())["fleet"]["gpus"]
    path = config(rest=CHAT + SMALL)
    shown = " ".join(run("plan", path, "--online").stdout.split())
    assert "nobody is moved to save money or to make room" in shown
    fleet = told("plan", path, "--online")["fleet"]
    assert (fleet["online"], fleet["met"], fleet["optimal"], fleet["lower_bound"]) == (True, True, False, 0.0)
    assert {d["subject"]: d["action"] for d in fleet["decisions"]} == {
        "chat-0": "keep",
        "small-0": "add",
        "small-1": "add",
    }
    (kept,) = [s for gpu in fleet["gpus"] for s in gpu["slices"] if s["replica"] == "chat-0"]
    assert kept["slice"] in {s["slice"] for gpu in was for s in gpu["slices"] if s["replica"] == "chat-0"}
    assert told("apply", path, "--online")["fleet"]["done"]
    again = told("plan", path, "--online")
    assert (again["changes"], again["fleet"]["transition"]["steps"]) == (False, [])
    assert told("apply", path, "--online")["fleet"]["done"] == []


def test_what_finds_no_room_online_is_told_with_what_would_help(config: Write) -> None:
    many = SMALL.replace("replicas: 2", "replicas: 9").replace("  - name", "models:\n  - name")
    path = config(rest=many, discover="{simulate: {h100-sxm: 1}}")
    fleet = told("plan", path, "--online")["fleet"]
    (unmet,) = fleet["unmet"]
    assert (unmet["model"], unmet["missing"], unmet["served"]) == ("small", 2.0, 7.0)
    assert "1 more H100-80GB-SXM" in unmet["remedies"]
    assert run("apply", path, "--online", code=1)


def test_a_plan_made_online_is_applied_as_it_was_looked_at(config: Write, tmp_path: Path) -> None:
    run("apply", config())
    path, looked_at = config(rest=CHAT + SMALL), tmp_path / "plan.json"
    looked_at.write_text(run("plan", path, "--online", "--json").stdout, encoding="utf-8")
    assert told("apply", path, "--online", "--plan", looked_at)["ok"]


def test_what_only_a_full_plan_can_do_is_refused_online_with_the_remedy(config: Write) -> None:
    fleet = "partition: planned\n  reserve: [{1g.10gb: 1, note: tuning}]"
    with pytest.raises(
        PlacementError, match=r"still to be made for other work \(1 x 1g\.10gb for 'tuning'\)"
    ) as refused:
        run("plan", config(fleet), "--online")
    assert refused.value.remedy == "Make a full plan: leave --online out."
    run("apply", config(fleet))
    assert not told("plan", config(fleet), "--online")["changes"]


@pytest.mark.parametrize("command", ["plan", "apply"])
@pytest.mark.parametrize("other", [("--ray", "head:6379"), ("--layouts-only",)])
def test_online_is_refused_where_it_means_nothing(config: Write, command: str, other: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        run(command, config(), "--online", *other)
    assert refused.value.remedy
