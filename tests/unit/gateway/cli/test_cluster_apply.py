"""`sliceway apply CONFIG --ray`: what is refused before anything happens, and what is shown of what the head does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app, cluster_apply, cluster_plan
from gateway.cluster_following import follow
from gateway.cluster_planning import config_text
from gateway.config import Config
from model_registry.errors import ConfigError
from placement.cluster.errors import ClusterUnreachable
from placement.cluster.members import Seat
from placement.cluster.survey import ReplicaNow, Survey, SurveyedNode
from placement.cluster.testing import made_gpu
from placement.errors import StalePlan, TransitionBlocked
from placement.transition import Place, Step
from placement.transition.steps import Transition

MODELS = Path(__file__).parents[4] / "configs" / "examples" / "models"
STEPS = tuple(
    Step(n, kind, Place.parse("a/GPU-0/1g.10gb@0"), "small-0", "small")  # type: ignore[arg-type]
    for n, kind in enumerate(("create", "start", "check"))
)


def told(done: int, *, begun: tuple[int, ...] = (), error: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the head tells when so many steps are done."""
    return {
        "ok": done == len(STEPS),
        "done": [s.as_public() for s in STEPS[:done]],
        "not_done": [s.as_public() for s in STEPS[done:]],
        "failed": STEPS[done].as_public() if error else None,
        "error": error,
        "under_way": done < len(STEPS) and not error,
        "begun": list(begun),
    }


def test_every_step_is_shown_once_also_those_that_nobody_saw_begin() -> None:
    shown: list[str] = []
    heard = [told(0, begun=(0,)), told(0, begun=(0,)), None, told(2, begun=(2,)), told(3)]
    outcome = follow(iter(heard), lambda step, what: shown.append(f"{what} {step.kind}"))
    assert shown == ["begun create", "begun start", "begun check"]
    assert outcome.ok


def test_what_stopped_it_is_told() -> None:
    shown: list[str] = []
    error = {"code": "x", "message": "small-0 failed: no memory", "where": "a", "remedy": "less"}
    outcome = follow(iter([told(1, begun=(1,)), told(1, error=error)]), lambda step, what: shown.append(what))
    assert shown == ["begun", "begun", "failed"]
    assert not outcome.ok
    assert str(outcome.error) == "a: small-0 failed: no memory\nless"
    assert [s.kind for s in outcome.not_done] == ["start", "check"]


def test_a_head_that_is_silent_is_waited_for_and_then_given_up() -> None:
    now = iter(range(0, 10_000, 60))

    def silent() -> Iterator[Mapping[str, Any] | None]:
        while True:
            yield None

    with pytest.raises(ClusterUnreachable, match="does not tell how far it is"):
        follow(silent(), lambda *_: None, monotonic=lambda: float(next(now)))


def config(replicas: int | dict[str, int] = 1, **fleet: Any) -> Config:
    model = {
        "name": "small",
        "source": "Qwen/Qwen3-0.6B",
        "metadata": str(MODELS / "Qwen--Qwen3-0.6B.json"),
        "max_model_len": 4096,
        "replicas": replicas,
    }
    tenants = [{"name": "acme", "models": "all"}]
    return Config.model_validate(
        {"version": "v1", "fleet": {"partition": "planned"} | fleet, "models": [model], "tenants": tenants}
    )


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cluster of one bare GPU that works by `known`; what the head is told is kept in `begun`."""

    class Head:
        path = tmp_path / "sliceway.yaml"
        known = config()
        begun: list[bool]
        gpus = (made_gpu(0),)
        cordoned: tuple[str, ...] = ()
        replicas: Mapping[str, ReplicaNow] = {}
        running: Mapping[str, int] = {}
        numbers: Mapping[str, int] = {}

        def survey(self, *_: object) -> Survey:
            return Survey(
                nodes=(SurveyedNode(node="a", gpus=self.gpus, cordoned=self.cordoned),),
                replicas=self.replicas,
                config=config_text(self.known),
                running=self.running,
                numbers=self.numbers,
            )

        def plan(self, asked: Config) -> Path:
            """What `plan --json` prints, in a file."""
            self.path.write_text(config_text(asked), encoding="utf-8")
            done = CliRunner().invoke(app, ["plan", str(self.path), "--ray", "h:1", "--json"], catch_exceptions=False)
            (file := tmp_path / "plan.json").write_text(done.stdout, encoding="utf-8")
            return file

        def apply(self, asked: Config, *words: str) -> Any:
            self.path.write_text(config_text(asked), encoding="utf-8")
            return CliRunner().invoke(app, ["apply", str(self.path), "--ray", "h:1", *words], catch_exceptions=False)

    found = Head()
    found.begun = []
    monkeypatch.setattr(cluster_apply, "survey_of", found.survey)
    monkeypatch.setattr(cluster_apply, "survey_again", found.survey)
    monkeypatch.setattr(cluster_plan, "survey_of", found.survey)
    monkeypatch.setattr(cluster_apply, "_begin", lambda *_, allow_mode_change: found.begun.append(allow_mode_change))
    monkeypatch.setattr(cluster_apply, "_told", lambda _: iter([told(3)]))
    return found


def test_it_begins_and_says_what_was_done(head: Any) -> None:
    done = head.apply(config(), "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["ok"], found["changed"], found["simulated"]) == (True, True, True)
    assert [s["action"] for s in found["fleet"]["done"]] == ["create", "start", "check"]
    assert head.begun == [False]
    shown = head.apply(config(), "--allow-mode-change").output
    assert "as planned: 3 steps done" in shown
    assert "create a GPU 0 1g.10gb@0" in shown
    assert head.begun == [False, True]


def test_another_configuration_than_the_heads_is_refused(head: Any) -> None:
    with pytest.raises(StalePlan, match="works by another configuration"):
        head.apply(config(replicas=2))
    assert head.begun == []


def test_layouts_are_cut_before_the_plan_is_made(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(layouts=[{"layout": ["1g.10gb@0"]}])
    told_to_cut: list[list[str]] = []

    def begin(_: str, __: Survey, transition: Transition, **___: bool) -> None:
        told_to_cut.append([str(step) for step in transition.steps])
        head.gpus = (made_gpu(0, holds=("1g.10gb@0",)),)

    monkeypatch.setattr(cluster_apply, "_begin", begin)
    done = head.apply(asked, "--json")
    found = json.loads(done.stdout)
    assert told_to_cut == [
        ["create a/GPU-0/1g.10gb@0"],
        ["start small-0 on a/GPU-0/1g.10gb@0", "check small-0 on a/GPU-0/1g.10gb@0"],
    ]
    assert [(g["gpu"], g["result"]) for g in found["gpus"]] == [("a/GPU-0", "changed")]
    assert (done.exit_code, found["ok"], found["changed"]) == (0, True, True)
    assert "a GPU 0" in head.apply(asked).output


def test_layouts_that_could_not_be_cut_end_it_and_nothing_is_planned(
    head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"code": "x", "message": "the driver is gone", "where": "a", "remedy": "look"}
    monkeypatch.setattr(cluster_apply, "_told", lambda _: iter([told(0, error=error)]))
    done = head.apply(config(layouts=[{"layout": ["1g.10gb@0"]}]), "--drain", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"], head.begun) == (1, False, [False])
    assert [g["result"] for g in found["gpus"]] == ["failed"]
    assert found["fleet"]["error"]["message"] == "the driver is gone"


def test_what_a_configuration_that_is_not_the_heads_says_is_not_cut(head: Any) -> None:
    with pytest.raises(StalePlan, match="works by another configuration"):
        head.apply(config(replicas=2, layouts=[{"layout": ["1g.10gb@0"]}]))
    assert head.begun == []


@pytest.mark.parametrize("words", [("--layouts-only",), ("--simulate", "h100-sxm:1")])
def test_what_means_nothing_on_a_cluster_is_refused(head: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="a cluster's"):
        head.apply(config(), *words)
    assert head.begun == []


def test_without_a_safe_order_it_is_refused(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: object, **__: object) -> Any:
        raise TransitionBlocked("small would fall below")

    monkeypatch.setattr("gateway.planning.plan_transition", blocked)
    with pytest.raises(TransitionBlocked):
        head.apply(config())
    assert head.begun == []


def test_the_reviewed_plan_is_carried_out_whatever_is_asked_meanwhile(head: Any) -> None:
    head.running = {"small": 3}
    file = head.plan(config())
    head.running = {"small": 40}
    done = head.apply(config(), "--plan", str(file), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["changed"]
    assert head.begun == [False]


def test_a_gpu_that_is_another_by_now_is_named(head: Any) -> None:
    file = head.plan(config())
    head.gpus = (made_gpu(0, holds=["1g.10gb@3"]),)
    with pytest.raises(StalePlan, match="another state of the fleet: GPU a/GPU-0 has changed"):
        head.apply(config(), "--plan", str(file))
    assert head.begun == []


def test_steps_that_only_one_of_the_two_has_are_named(head: Any) -> None:
    head.known = config(replicas=2)
    file = head.plan(config(replicas=2))
    head.known = config()
    with pytest.raises(StalePlan, match=r"only by now: create a/GPU-0 .*; only then: create .*, and 3 more"):
        head.apply(config(), "--plan", str(file))
    assert head.begun == []


def test_another_number_by_demand_is_named(head: Any) -> None:
    head.known, head.numbers = config({"min": 1, "max": 3}), {"small": 1}
    file = head.plan(head.known)
    head.numbers = {"small": 2}
    with pytest.raises(StalePlan, match="2 replicas of small, and 1 then"):
        head.apply(head.known, "--plan", str(file))
    assert head.begun == []


def test_a_file_that_holds_no_plan_is_refused_before_anybody_is_asked(
    head: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster_apply, "survey_of", lambda *_: pytest.fail("the cluster was asked"))
    (file := tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not what `sliceway plan --json` prints"):
        head.apply(config(), "--plan", str(file))


LAID_OUT = config(layouts=[{"layout": ["3g.40gb@0", "3g.40gb@4"]}])


def cut_and_seated(head: Any, monkeypatch: pytest.MonkeyPatch, seat: str | None, **more: Any) -> list[list[str]]:
    """What the head is told. When it has cut the GPU it has seated `small-0` on `seat`, and what else it says is another by then."""
    begun: list[list[str]] = []

    def begin(_: str, __: Survey, transition: Transition, **___: bool) -> None:
        begun.append([step.kind for step in transition.steps])
        head.gpus = (made_gpu(0, holds=("3g.40gb@0", "3g.40gb@4")),)
        head.replicas = {"small-0": replica_on(seat)} if seat else {}
        for name, value in more.items():
            setattr(head, name, value)

    monkeypatch.setattr(cluster_apply, "_begin", begin)
    monkeypatch.setattr(cluster_apply, "LOOK_SECONDS", 0.0)
    return begun


def replica_on(slice_id: str) -> ReplicaNow:
    return ReplicaNow(seat=Seat(replica="small-0", model="small", node="a", slice_id=slice_id), state="ready")


@pytest.mark.parametrize("before", [None, "GPU-0/1g.10gb@0"])
@pytest.mark.parametrize("after", [None, "GPU-0/3g.40gb@0", "GPU-0/3g.40gb@4"])
def test_whom_the_head_seats_once_gpus_are_cut_makes_a_reviewed_plan_no_other(
    head: Any, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str | None
) -> None:
    head.gpus = (made_gpu(0, holds=("1g.10gb@0",)),)
    head.replicas = {"small-0": replica_on(before)} if before else {}
    file = head.plan(LAID_OUT)
    begun = cut_and_seated(head, monkeypatch, after)
    done = head.apply(LAID_OUT, "--plan", str(file), "--drain", "--json")
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (0, True), done.stdout
    assert "destroy" in begun[0]
    assert begun[1:] == ([] if after else [["start", "check"]])


def test_a_reviewed_plan_that_is_stale_from_the_beginning_cuts_nothing(
    head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = head.plan(LAID_OUT)
    head.gpus = (made_gpu(0, holds=("1g.10gb@0",)),)
    begun = cut_and_seated(head, monkeypatch, None)
    with pytest.raises(StalePlan, match="GPU a/GPU-0 has changed"):
        head.apply(LAID_OUT, "--plan", str(file))
    assert begun == []


def test_demand_that_changes_while_gpus_are_cut_is_not_that_of_the_reviewed_plan(
    head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config({"min": 1, "max": 3}, layouts=[{"layout": ["3g.40gb@0", "3g.40gb@4"]}])
    head.known, head.numbers = asked, {"small": 1}
    file = head.plan(asked)
    begun = cut_and_seated(head, monkeypatch, None, numbers={"small": 2})
    assert head.apply(asked, "--plan", str(file)).exit_code == 0
    assert begun[1] == ["start", "check"]


@pytest.mark.parametrize(
    ("another", "why"),
    [
        ({"known": config(replicas=2)}, "works by another configuration"),
        ({"cordoned": ("GPU-0",)}, "0 of small, and 1 then"),
    ],
)
def test_what_was_cut_is_told_also_where_no_plan_follows(
    head: Any, monkeypatch: pytest.MonkeyPatch, another: dict[str, Any], why: str
) -> None:
    file = head.plan(LAID_OUT)
    begun = cut_and_seated(head, monkeypatch, None, **another)
    done = head.apply(LAID_OUT, "--plan", str(file), "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"], found["changed"], len(begun)) == (1, False, True, 1)
    assert [(g["gpu"], g["result"]) for g in found["gpus"]] == [("a/GPU-0", "changed")]
    assert why in found["fleet"]["error"]["message"]


def test_what_was_cut_is_shown_before_the_error(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    cut_and_seated(head, monkeypatch, None, known=config(replicas=2))
    monkeypatch.setattr(cluster_apply, "show_outcomes", lambda gpus: shown.append(len(gpus)))
    with pytest.raises(StalePlan, match="works by another configuration"):
        head.apply(LAID_OUT)
    assert shown == [1]
