"""Reports of made-up measurements, evaluated as real ones are."""

from __future__ import annotations

from random import Random

from loadtests.lab.evaluate import Measured, Surroundings, evaluate
from loadtests.lab.matrix import cells_of, phases
from loadtests.lab.report import Report
from loadtests.lab.scenario import Context, IsolationScenario
from loadtests.run_result import Run
from loadtests.samples import Sample, quantiles


def report_of(
    beside: float = 1.5, *, deployment: str | None = None, model: str = "chat-a", name: str = "A <b> & c"
) -> Report:
    scenario = IsolationScenario.model_validate(
        {
            "name": name,
            "victim": {"name": "quiet", "model": model, "slo": {"ttft": "500ms"}},
            "aggressors": [{"kind": "prefill_flood", "tenant": "noisy"}],
            "settings": [{"where": "other_slice", "model": "b"}],
            "rounds": 2,
            "budget": {"p99_ratio": 1.1, "metrics": ["ttft"]},
        }
    )
    context = Context(deployment=deployment, layout={"kind": "cpu"}, software={"vllm": "0.32.0"})
    cells = cells_of(scenario, [], lambda m, t: 1000, context)
    measured = []
    for number, phase in enumerate(phases(scenario, cells, "http://127.0.0.1:1")):
        random, middle = Random(number), 1.0 if phase.cell.beside is None else beside
        rows = [
            Sample(
                "quiet", model, "cpu-0", 3.0 + i, 3.0 + i, 4.0 + i,
                ttft_seconds=0.1 * middle * random.uniform(0.98, 1.02), itl_seconds=(0.02 * middle,) * 3,
                e2e_seconds=0.2 * middle, output_tokens=4,
            )
            for i in range(120)
        ]  # fmt: skip
        measured.append(Measured(phase.round, phase.cell, 40.0 * number, Run(tuple(rows), quantiles([0.0001]))))
    about = Surroundings("2026-01-01T00:00:00+00:00", "sliceway bench isolation s.yaml", {"cores": 2}, {})
    return evaluate(scenario, cells, measured, context=context, surroundings=about, replicates=100)
