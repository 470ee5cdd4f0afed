"""The plugin's directory and environment, checked with the import machinery that vLLM uses to find plugins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from placement.errors import PlacementError
from placement.plugin import PLUGIN_NAME, install_plugin, plugin_environment
from placement.slices import Slice, SliceKind
from placement.vllm_plugin import TESTED_VERSIONS, is_tested

MIG = Slice("GPU-1/1g.10gb@0", SliceKind.MIG, "1g.10gb", 9984 * 2**20, uuid="MIG-1")
CPU = Slice("cpu-0", SliceKind.CPU, None, 2**30, cores=(0,))
GPU = Slice("GPU-1", SliceKind.GPU, None, 2**36, uuid="GPU-1")

# What vLLM does to find plugins, once in the process itself and once in each kind of child that engines start.
DISCOVER = """
import json, multiprocessing, os, subprocess, sys
from importlib.metadata import entry_points

def found(_=None):
    points = entry_points(group="vllm.platform_plugins")
    return [(p.name, p.load().__code__.co_filename) for p in points]

if __name__ == "__main__":
    result = {"self": found()}
    for method in ("spawn", "fork", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            result[method] = pool.map(found, [None])[0]
    if len(sys.argv) == 1:
        child = subprocess.run([sys.executable, __file__, "child"], capture_output=True, text=True, check=True)
        result["subprocess"] = json.loads(child.stdout)["self"]
    print(json.dumps(result))
"""


def discovered(tmp_path: Path, environment: dict[str, str]) -> dict[str, list[list[str]]]:
    script = tmp_path / "discover.py"
    script.write_text(DISCOVER, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, script],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    result: dict[str, list[list[str]]] = json.loads(run.stdout)
    return result


def test_every_kind_of_child_process_finds_the_plugin_once(tmp_path: Path) -> None:
    environment = plugin_environment(MIG, tmp_path / "plugins", {})
    directory = environment["PYTHONPATH"]

    result = discovered(tmp_path, environment)

    assert set(result) == {"self", "spawn", "fork", "forkserver", "subprocess"}
    for points in result.values():
        assert points == [[PLUGIN_NAME, f"{directory}/{PLUGIN_NAME}/__init__.py"]]


def test_beside_an_installed_sliceway_the_controllers_copy_is_the_only_one(tmp_path: Path) -> None:
    installed = tmp_path / "site"
    info = installed / "sliceway-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sliceway\nVersion: 0.1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nsliceway_mig = an_older_plugin:register\n", encoding="utf-8"
    )
    (installed / "an_older_plugin.py").write_text("def register(): return 'older'\n", encoding="utf-8")

    environment = plugin_environment(MIG, tmp_path / "plugins", {"PYTHONPATH": str(installed)})

    directory = environment["PYTHONPATH"].split(os.pathsep)[0]
    assert discovered(tmp_path, environment)["self"] == [[PLUGIN_NAME, f"{directory}/{PLUGIN_NAME}/__init__.py"]]
    assert discovered(tmp_path, {"PYTHONPATH": str(installed)})["self"][0][1].endswith("an_older_plugin.py")


def test_the_packages_own_entry_point_has_the_same_name_so_that_vllm_keeps_one_of_them() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.platform_plugins"] == {PLUGIN_NAME: "placement.vllm_plugin:register"}


@pytest.mark.parametrize("target", [CPU, GPU])
def test_off_mig_nothing_is_set_and_nothing_is_made(target: Slice, tmp_path: Path) -> None:
    assert plugin_environment(target, tmp_path / "plugins", {"VLLM_PLUGINS": "other"}) == {}
    assert not (tmp_path / "plugins").exists()


def test_what_was_on_the_path_stays_behind_the_plugin_and_empty_parts_go(tmp_path: Path) -> None:
    once = plugin_environment(MIG, tmp_path, {"PYTHONPATH": "/a::/b:"})
    directory, *rest = once["PYTHONPATH"].split(os.pathsep)
    assert rest == ["/a", "/b"]
    again = plugin_environment(MIG, tmp_path, once)
    assert again["PYTHONPATH"] == once["PYTHONPATH"]
    assert Path(directory).is_dir()


@pytest.mark.parametrize(
    ("operators", "expected"),
    [("", "sliceway_mig"), ("a,b", "a,b,sliceway_mig"), ("sliceway_mig,a", "sliceway_mig,a")],
)
def test_an_allow_list_of_the_operator_lets_the_plugin_in(operators: str, expected: str, tmp_path: Path) -> None:
    assert plugin_environment(MIG, tmp_path, {"VLLM_PLUGINS": operators})["VLLM_PLUGINS"] == expected


def test_without_an_allow_list_none_is_made(tmp_path: Path) -> None:
    assert "VLLM_PLUGINS" not in plugin_environment(MIG, tmp_path, {})


def test_the_directory_is_made_once_and_leaves_no_drafts(tmp_path: Path) -> None:
    first = install_plugin(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert install_plugin(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == written
    assert list(tmp_path.iterdir()) == [first]


def test_a_directory_that_cannot_be_written_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PlacementError, match="cannot be put here") as raised:
        install_plugin(tmp_path / "file")
    assert "state_dir" in (raised.value.remedy or "")


def test_local_builds_of_a_tested_version_count_as_tested() -> None:
    assert is_tested(TESTED_VERSIONS[-1])
    assert is_tested("0.32.0+cu129")
    assert not is_tested("0.99.0")
    assert not is_tested("0.32.0rc1")


def test_the_documentation_lists_the_tested_versions() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pinning.md").read_text(encoding="utf-8")
    *most, last = TESTED_VERSIONS
    assert f"{', '.join(most)} and {last}" in page.replace("\n", " ")
