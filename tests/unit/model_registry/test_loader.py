"""Configuration files: what is read, how files include files, and how each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest

from gateway.config import load_config
from model_registry.configfile import tree
from model_registry.errors import ConfigError
from model_registry.loader import load_yaml
from model_registry.schema import FilePath, Section


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes, name: str = "sliceway.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


def problems_of(path: Path) -> list[str]:
    """`line: field: message` and the remedy of every problem, the file's name left out."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    told = []
    for problem in caught.value.problems:
        assert problem.where is not None
        assert str(path.parent) in problem.where
        told.append(
            f"{problem.where.removeprefix(str(path))}: {problem.message} | {problem.remedy}".removeprefix(":").strip()
        )
    assert caught.value.message == caught.value.problems[0].message
    return told


def test_a_whole_configuration_becomes_typed_values(write):
    config = load_config(
        write(
            """
version: v1
models:
  - name: chat
    source: org/chat
    kv_cache_memory: 1.5GiB
    max_num_seqs: 8
tenants:
  - {name: acme, models: [chat]}
  - {name: globex}
gateway: {listen: "0.0.0.0:9000"}
"""
        )
    )
    assert config.models[0].kv_cache_memory == 3 * 2**29
    assert config.tenants[0].models == ("chat",)
    assert config.tenants[1].models == "all"
    assert config.gateway.listen == "0.0.0.0:9000"


def test_yaml_1_2_words_and_numbers(write):
    path = write(
        "a: yes\nb: on\nc: 010\nd: 0o17\ne: 1_000\nf: 1:30\ng: .inf\nh: 2024-01-01\ni: 1e3\nj: ~\nk:\nl: True\n"
    )
    assert tree.read_file(path).plain() == {
        "a": "yes", "b": "on", "c": 10, "d": 15, "e": 1000, "f": "1:30", "g": float("inf"), "h": "2024-01-01", "i": 1000.0, "j": None, "k": None, "l": True,
    }  # fmt: skip


def test_a_directive_for_yaml_1_1_does_not_change_words(write):
    assert tree.read_file(write("%YAML 1.1\n---\na: yes\nb: off\nc: false\n")).plain() == {
        "a": "yes",
        "b": "off",
        "c": False,
    }


def test_anchors_and_merge_keys_work_and_the_nearer_value_wins(write):
    path = write("base: &b {x: 1, y: 2}\nother: &o {y: 3, z: 4}\nm:\n  <<: [*b, *o]\n  x: 9\n")
    assert tree.read_file(path).plain()["m"] == {"x": 9, "y": 2, "z": 4}


def test_a_byte_order_mark_is_no_key(write):
    assert load_config(write(b"\xef\xbb\xbfversion: v1\n")).version == "v1"


# -- mistakes in one file -------------------------------------------------------------------------------------------


def test_every_problem_is_told_at_once_with_its_line_and_field(write):
    path = write(
        """version: v1
models:
  - name: a
    source: org/a
    max_modle_len: 4096
    max_num_seqs: 0
  - source: org/b
    dtype: bf16
tenant: []
"""
    )
    assert problems_of(path) == [
        "5: models[0].max_modle_len: unknown key 'max_modle_len' | Did you mean 'max_model_len'?",
        "6: models[0].max_num_seqs: must be at least 1, not 0 | Sequences that run at once in one replica.",
        "7: models[1]: 'name' is missing | The name clients send as `model`.",
        "8: models[1].dtype: must be 'auto', 'bfloat16', 'float16' or 'float32', not 'bf16' | Did you mean 'bfloat16'?",
        "9: tenant: unknown key 'tenant' | Did you mean 'tenants'?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: []\n", "1: 'version' is missing | Add `version: v1`."),
        ("version: v2\n", "1: version: must be 'v1', not 'v2'"),
        ("version: 1\n", "1: version: must be 'v1', not 1 | Did you mean 'v1'?"),
        ("version: v1\nengine: {max_model_len: 3}\n", "2: engine.max_model_len: unknown key 'max_model_len' | It belongs under models[]."),
        ("version: v1\nfleet:\n  cpu: {qqq: 1}\n", "3: fleet.cpu.qqq: unknown key 'qqq' | Keys here: memory, slices."),
        ("version: v1\nfleet: {cpu: {slices: two}}\n", "2: fleet.cpu.slices: must be a whole number or 'auto', not 'two'"),
        ("version: v1\nfleet: {cpu: {memory: 8 Gb}}\n", "2: fleet.cpu.memory: '8 Gb' has no known unit; did you mean 8GiB or 8GB?"),
        ("version: v1\nfleet: {cpu: {memory: 8 parsecs}}\n", "2: fleet.cpu.memory: '8 parsecs' has no known unit; units are B, KiB"),
        ("version: v1\nfleet: {cpu: {memory: much}}\n", "2: fleet.cpu.memory: 'much' is no size; write a number and one of B, KiB"),
        ("version: v1\nfleet: {cpu: {memory: -1}}\n", "2: fleet.cpu.memory: must be more than 0, not -1"),
        ("version: v1\nfleet: {prices: {h200: -1}}\n", "2: fleet.prices.h200: must be at least 0, not -1 | Per GPU-hour by product, in any currency: `{h100-sxm: 2.5}`."),
        ("version: v1\nfleet: {prices: {h100-smx: 1}}\n", "2: fleet.prices: there is no GPU product 'h100-smx' in the MIG catalogue | Did you mean h100-sxm?"),
        ("version: v1\nfleet: {discover: {simulate: {}}}\n", "2: fleet.discover.simulate: must be at least 1 long, not an empty mapping | GPUs by product"),
        ("version: !!python/name:os.system v1\n", "1: the tag 'python/name:os.system' is not known here | Write the value without a tag."),
        ("{version: v1,\n", "2: a value is missing, or a bracket is opened and never closed | Close it."),
        ("version: v1\nmodels: [{name: a, source: x/y, demand: {requests_per_second: 0, prompt_tokens: 1, output_tokens: 1}}]\n",
         "2: models[0].demand.requests_per_second: must be more than 0, not 0"),
        (f"version: v1\nfleet: {{cpu: {{memory: {'9' * 400}GiB}}}}\n", "2: fleet.cpu.memory: '9999"),
        ("version: v1\nmodels:\n", "2: models: must be a list, but nothing stands here"),
        ("version: v1\nmodels: {name: a}\n", "2: models: must be a list, not a mapping"),
        ("version: v1\nmodels: [{name: a, source: x/y, replicas: {min: 9, max: 8}}]\n", "2: models[0].replicas: min 9 is more than max 8; swap them"),
        ("version: v1\ngateway: {listen: 8080}\n", "2: gateway.listen: must be text, not 8080 | Put it in quotes: '8080'"),
        ("version: v1\ntenants: [{name: t, models: some}]\n", "2: tenants[0].models: must be a list or 'all', not 'some'"),
        ("version: v1\ntenants: [{name: t, models: [a, 3]}]\n", "2: tenants[0].models[1]: must be text, not 3 | Put it in quotes: '3'"),
        ("version: v1\nmodels: [{name: a}]\n", "2: models[0]: name either `source` (sliceway runs the engine) or `endpoints`"),
        ("version: v1\ntenants: [{name: t, models: [chta]}]\nmodels: [{name: chat, source: a/b}]\n", "2: tenants[0].models: tenant 't' names the unknown model 'chta' | Did you mean 'chat'?"),
        ("version: v1\ntenants: [{name: t}, {name: t}]\n", "2: tenants[1].name: the name 't' is taken"),
        ("version: v1\nmodels:\n - {name: a, source: x/y, slices: [s]}\n - {name: b, source: x/y, slices: [s]}\n", "4: models[1].slices: slice 's' is named for a second replica"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_the_operators_words(write, text: str, problem: str):
    [told] = problems_of(write(text))
    assert told.startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty | `sliceway init` writes one to start from."),
        ("# nothing but a comment\n", "the file is empty"),
        ("- 1\n", "1: the file holds a list, not keys with values"),
        ("chat\n", "1: the file holds the value 'chat', not keys with values"),
        ("version: v1\n\tmodels: []\n", "2: a tab stands where YAML wants spaces | Indent with spaces."),
        (
            "version: v1\nversion: v1\n",
            "2: the key 'version' stands here twice | It is already set on line 1; remove one of them.",
        ),
        ("a: b: c\n", "1: a `: ` stands where no key can be"),
        ("a: 'x\n", "2: a quote is opened and never closed"),
        ("a: @x\n", "1: this character cannot start a value | Put the value in quotes."),
        ("a: *x\n", "1: an alias `*name` without an anchor `&name` above it"),
        ("a: &x [1, *x]\n", "1: an alias contains itself"),
        ("a: &x {<<: *x}\n", "1: `<<` takes a mapping"),
        ("a: !!python/object:os.system 1\n", "1: the tag 'python/object:os.system' is not known here"),
        ("a: !own {b: 1}\n", "1: the tag '!own' is not known here"),
        ("a: 1\n---\nb: 2\n", "2: a second document starts here"),
        ("  a: 1\nb: 2\n", "2: this line does not belong to what stands above it, which was complete already"),
        ("a: [1, 2\nb: 3\n", "2: a list in brackets `[` is not closed, or lacks a comma"),
        ("a: {b: 1\nc: 3\n", "2: a mapping in braces `{` is not closed, or lacks a comma"),
        ("a: 1\n% b\n", "2: `%` before a line, `&` and `*` before a value mean something to YAML itself"),
        ("1: 2\n", "1: '1' is no key"),
        ("? [a]\n: 1\n", "1: a list or a mapping is no key"),
        ("[" * 5000, "values are nested too deeply"),
        (b"a: \xff\n", "1: byte 0xff is not UTF-8"),
        (b"a: 1\nb: \x00\n", "2: this is no YAML"),
    ],
)
def test_what_is_no_configuration_at_all(write, text: str | bytes, problem: str):
    told = problems_of(write(text))
    assert told[0].startswith(problem)


def test_aliases_that_multiply_are_stopped(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    told = problems_of(write("\n".join(lines)))
    assert "more than 100000 values" in told[0]
    assert len(told) == 1


def test_a_file_that_is_far_too_large_is_not_parsed(write):
    [told] = problems_of(write("#" * (tree.MAX_FILE_BYTES + 1)))
    assert "larger than 4 MiB" in told


def test_a_missing_file_and_a_directory(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no such file\n`sliceway init .*absent\.yaml`"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "a\0b")


def test_one_fault_reached_through_two_aliases_is_told_once(write):
    path = write(
        "version: v1\nmodels:\n - &m {name: a, source: x/y, dtype: nope}\ntenants: []\nfleet: {cpu: {slices: 1}}\n"
    )
    assert len(problems_of(path)) == 1


# -- includes ---------------------------------------------------------------------------------------------------------


def test_included_lists_come_first_and_mappings_merge(write):
    write("models: [{name: a, source: org/a}]\ngateway: {max_body: 1MiB}\n", "parts/models.yaml")
    write("version: v1\ntenants: [{name: t}]\n", "parts/tenants.yaml")
    path = write(
        "version: v1\ninclude: [parts/models.yaml, parts/tenants.yaml]\nmodels: [{name: b, source: org/b}]\ngateway: {listen: 'h:1'}\n"
    )
    config = load_config(path)
    assert [m.name for m in config.models] == ["a", "b"]
    assert [t.name for t in config.tenants] == ["t"]
    assert (config.gateway.max_body, config.gateway.listen) == (2**20, "h:1")


def test_a_single_include_may_be_written_without_a_list(write):
    write("tenants: [{name: t}]\n", "t.yaml")
    assert load_config(write("version: v1\ninclude: t.yaml\n")).tenants[0].name == "t"


def test_a_value_set_in_two_files_names_both_places(write, tmp_path: Path):
    write("gateway:\n  listen: a:1\n", "other.yaml")
    [told] = problems_of(write("version: v1\ninclude: [other.yaml]\ngateway:\n\n  listen: b:2\n"))
    assert told == f"5: 'listen' is set twice | It is already set at {tmp_path}/other.yaml:2; keep one of the two."


def test_a_list_inside_a_section_is_not_silently_joined(write):
    write("engine: {command: [a]}\n", "other.yaml")
    [told] = problems_of(write("version: v1\ninclude: [other.yaml]\nengine: {command: [b]}\n"))
    assert told.startswith("3: 'command' is set twice")


def test_a_fault_in_an_included_file_has_that_files_line(write, tmp_path: Path):
    write("models:\n - {name: a, source: x/y, dtype: nope}\n", "m.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(write("version: v1\ninclude: [m.yaml]\n"))
    assert caught.value.where == f"{tmp_path}/m.yaml:2: models[0].dtype"


def test_circles_repeats_and_missing_files_are_told_where_they_are_included(write, tmp_path: Path):
    write("include: [b.yaml]\n", "a.yaml")
    write("include: [a.yaml]\n", "b.yaml")
    write("{}\n", "c.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(write("version: v1\ninclude: [a.yaml, c.yaml, ./c.yaml, absent.yaml, 3, ~nobody-here/x.yaml]\n"))
    told = sorted(
        f"{p.where}: {p.message} | {p.remedy}".replace(str(tmp_path) + "/", "") for p in caught.value.problems
    )
    assert told == [
        "absent.yaml: there is no such file | `sliceway init "
        f"{tmp_path}/absent.yaml` writes one to start from. Included at {tmp_path}/sliceway.yaml:2.".replace(
            f"{tmp_path}/", ""
        ),
        "b.yaml:1: include: files include one another in a circle: a.yaml -> b.yaml -> a.yaml | Remove one of these includes.",
        "sliceway.yaml:2: include: './c.yaml' is included a second time | It is already included at sliceway.yaml:2.",
        "sliceway.yaml:2: include: '~nobody-here/x.yaml' is no usable path: Could not determine home directory. | None",
        "sliceway.yaml:2: include: `include` takes file names | Write `include: [models.yaml, tenants.yaml]`; paths are relative to this file.",
    ]


# -- paths ------------------------------------------------------------------------------------------------------------


class _Paths(Section):
    version: Literal["v1"] = "v1"
    always: Annotated[str | None, FilePath()] = None
    source: Annotated[str | None, FilePath("source")] = None
    command: Annotated[str | None, FilePath("command")] = None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("always: x/y", "{here}/x/y"),
        ("always: ../x", "{up}/x"),
        ("always: /x/./y", "/x/y"),
        ("always: ~/x", "{home}/x"),
        ("source: org/name", "org/name"),
        ("source: ./org/name", "{here}/org/name"),
        ("source: ../m", "{up}/m"),
        ("source: m.gguf", "{here}/m.gguf"),
        ("source: there", "{here}/there"),
        ("source: not-there", "not-there"),
        ("command: python3", "python3"),
        ("command: .venv/bin/python", "{here}/.venv/bin/python"),
    ],
)
def test_relative_paths_mean_beside_the_file_that_names_them(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
):
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "sub" / "there").mkdir(parents=True)
    write(line + "\n", "sub/part.yaml")
    config = load_yaml(write("include: [sub/part.yaml]\n"), _Paths)
    value = next(v for v in (config.always, config.source, config.command) if v is not None)
    assert value == expected.format(here=tmp_path / "sub", up=tmp_path, home="/home/someone")


def test_the_real_schema_marks_its_paths(write, tmp_path: Path):
    config = load_config(
        write(
            "version: v1\nstate_dir: ../state\nengine: {python: bin/python}\n"
            "models: [{name: a, source: ./m, chat_template: t.jinja}, {name: b, source: org/b}]\n",
            "sub/c.yaml",
        )
    )
    here = tmp_path / "sub"
    assert config.state_dir == tmp_path / "state"
    assert config.engine.python == f"{here}/bin/python"
    assert (config.models[0].source, config.models[0].chat_template) == (f"{here}/m", f"{here}/t.jinja")
    assert config.models[1].source == "org/b"


def test_a_home_that_cannot_be_found(write):
    [told] = problems_of(write("version: v1\nstate_dir: ~nobody-here/x\n"))
    assert told.startswith("2: '~nobody-here/x' names a home directory that cannot be found")
