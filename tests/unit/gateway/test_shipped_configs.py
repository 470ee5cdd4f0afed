"""Every configuration that is shipped loads, and its page names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import load_config
from model_registry.schema import Section

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_loads_and_is_commented(path: Path):
    config = load_config(path)
    assert config.models
    assert config.tenants
    assert path.read_text(encoding="utf-8").startswith("# "), "say in the first line what the file is for"
    assert all(Path(str(m.source)).is_absolute() for m in config.models if ".sliceway" in str(m.source))


def test_the_page_names_each_file_and_no_other():
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"[{path.name}]({path.name})" in page
    assert page.count(".yaml](") == len(FILES)


def test_the_pages_example_of_errors_is_what_is_told(tmp_path: Path):
    from model_registry.errors import ConfigError

    path = tmp_path / "sliceway.yaml"
    path.write_text(
        "version: v1\nmodels:\n  - name: a\n    source: org/a\n    max_modle_len: 1\n\nfleet:\n  cpu:\n    memory: 8 Gb\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    page = " ".join((CONFIGS / "README.md").read_text(encoding="utf-8").split())
    for problem in caught.value.problems:
        assert str(problem.where).removeprefix(f"{tmp_path}/") in page
        assert problem.message in page
        assert str(problem.remedy) in page


def _sections(section: type[Section]) -> set[type[Section]]:
    return {section}.union(*(_sections(s) for s in section.__subclasses__()))


def test_every_section_is_closed_and_frozen():
    for section in _sections(Section):
        assert section.model_config["extra"] == "forbid", section
        assert section.model_config["frozen"], section
