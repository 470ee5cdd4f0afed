from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gateway.cli.pack import register
from model_registry.errors import ConfigError, IllegalLayout, SlicewayError, UnknownProduct, UnknownProfile


def application() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def pack(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(application(), ["pack", *words, "--json"])
    if done.exception is not None:
        raise done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*words: str) -> SlicewayError:
    with pytest.raises(SlicewayError) as caught:
        pack(*words)
    return caught.value


@pytest.fixture
def in_use(tmp_path: Path) -> Path:
    return tmp_path / "in-use.json"


def test_the_answer_has_exactly_what_is_promised() -> None:
    found = pack("--gpu", "a100-80gb", "--demand", "2g.20gb=7")
    assert set(found) == {"product", "gpus", "optimal", "lower_bound", "layouts", "seconds"}
    assert (found["gpus"], found["optimal"], found["lower_bound"]) == (3, True, 3)
    assert sorted(len(layout) for layout in found["layouts"]) == [1, 3, 3]
    assert found["seconds"] >= 0


def test_demands_of_one_profile_add_up() -> None:
    words = ("--gpu", "A100-80GB", "--demand", "2g.20gb=3", "--demand", "2g.20gb=4")
    assert pack(*words)["gpus"] == 3


def test_gpus_in_use_come_first_and_keep_what_they_hold(in_use: Path) -> None:
    in_use.write_text('[["7g.80gb@0"], ["3g.40gb@0"], ["4g.40gb@0"]]', encoding="utf-8")
    found = pack("--gpu", "a100-80gb", "--demand", "1g.10gb=3", "--occupied", str(in_use))
    assert found["gpus"] == 3
    assert found["layouts"][0] == []
    created = [text for layout in found["layouts"] for text in layout]
    assert sorted(text.split("@")[0] for text in created) == ["1g.10gb"] * 3
    assert all(int(text.split("@")[1]) >= 4 for text in created)


def test_nothing_asked_is_nothing_needed() -> None:
    found = pack("--gpu", "h100-sxm", "--demand", "1g.10gb=0")
    assert (found["gpus"], found["layouts"], found["optimal"]) == (0, [], True)


def test_a_million_of_each_is_no_problem() -> None:
    found = pack("--gpu", "a30", "--demand", "1g.6gb=1000000", "--demand", "4g.24gb=1000")
    assert (found["gpus"], found["optimal"]) == (251_000, True)


def test_it_is_drawn_to_scale_with_like_gpus_together() -> None:
    done = CliRunner().invoke(
        application(), ["pack", "--gpu", "a100-80gb", "--demand", "2g.20gb=7"], env={"COLUMNS": "100"}
    )
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3 GPUs A100-80GB (no fewer will do")
    assert [line.split()[0] for line in lines[2:]] == ["2x", "1x"]
    assert lines[2].count("2g.20gb") == 3


def test_what_stays_is_told_apart_from_what_is_created(in_use: Path) -> None:
    in_use.write_text('[["3g.40gb@4"]]', encoding="utf-8")
    words = ("pack", "--gpu", "a100-80gb", "--demand", "2g.20gb=3", "--occupied", str(in_use))
    lines = CliRunner().invoke(application(), words, env={"COLUMNS": "100"}).stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [["1x", "in", "use"], ["stays:", "3g.40gb@4"]]
    assert lines[2].count("2g.20gb") == 2
    assert lines[4].split()[0] == "1x"
    assert len(lines) == 5


def test_an_unknown_product_or_profile_is_told_with_what_was_meant() -> None:
    error = refused("--gpu", "a100-80gb", "--demand", "2g.20=1")
    assert isinstance(error, UnknownProfile)
    assert error.where == "--demand"
    assert "2g.20gb" in str(error.remedy)
    unknown = refused("--gpu", "a100-90gb", "--demand", "2g.20gb=1")
    assert isinstance(unknown, UnknownProduct)
    assert unknown.where == "--gpu"


@pytest.mark.parametrize("demand", ["2g.20gb", "2g.20gb=", "2g.20gb=-1", "2g.20gb=x", "2g.20gb=1.5", "2g.20gb=1000001"])
def test_a_demand_that_is_no_number_of_slices_is_refused(demand: str) -> None:
    error = refused("--gpu", "a100-80gb", "--demand", demand)
    assert isinstance(error, ConfigError)
    assert error.where == "--demand"


@pytest.mark.parametrize(
    ("text", "where", "kind"),
    [
        ("{", ":1:2", ConfigError),
        ('{"a": 1}', "", ConfigError),
        ("7", "", ConfigError),
        ('[["3g.40gb@0"], 5]', "[1]", ConfigError),
        ('[["3g.40gb@0", 5]]', "[0][1]", ConfigError),
        ('[["3g.40gb"]]', "[0]", UnknownProfile),
        ('[["3g.40gb@1"]]', "[0]", UnknownProfile),
        ('[[], ["3g.40gb@0", "2g.20gb@2"]]', "[1]", IllegalLayout),
        ("[" * 100_000, "", ConfigError),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_the_place(
    in_use: Path, text: str, where: str, kind: type[SlicewayError]
) -> None:
    in_use.write_text(text, encoding="utf-8")
    error = refused("--gpu", "a100-80gb", "--demand", "1g.10gb=1", "--occupied", str(in_use))
    assert isinstance(error, kind)
    assert error.where == f"{in_use}{where}"


def test_a_file_that_is_not_there_or_not_text_is_refused(in_use: Path) -> None:
    words = ("--gpu", "a100-80gb", "--demand", "1g.10gb=1", "--occupied", str(in_use))
    assert "No such file" in refused(*words).message
    in_use.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(*words).message


def test_a_product_whose_starts_nobody_knows_is_not_packed() -> None:
    assert "nobody has published" in refused("--gpu", "rtx-pro-5000", "--demand", "1g.12gb=1").message
