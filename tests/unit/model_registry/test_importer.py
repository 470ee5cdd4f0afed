"""Importing models: what is made, when nothing is done, and that failure leaves the models directory as it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_registry.conversion import ImportProgress, Report
from model_registry.errors import ConfigError, ImportFailed, ModelNotFound, ModelUnreadable
from model_registry.importer import RECORD, import_model, list_models
from model_registry.testing import write_gguf, write_model

LLAMA = {"general.architecture": "llama", "llama.context_length": 64}


class FakeConverter:
    """Writes a model without reading the GGUF; `failure` is raised after half of it is written."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[Path, Path | None]] = []

    def __call__(self, gguf: Path, out: Path, *, chat_template: Path | None, report: Report) -> Mapping[str, Any]:
        self.calls.append((gguf, chat_template))
        report(ImportProgress("writing", 0.5))
        write_model(out)
        (out / "model.safetensors").chmod(0o600)
        if self.failure:
            (out / "config.json").unlink()
            raise self.failure
        return {"dtype": "bfloat16"}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny Model-Q4_K_M.gguf", LLAMA, [("token_embd.weight", (8, 8), 0)])


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "models"


def _left(into: Path) -> list[str]:
    return sorted(p.name for p in into.iterdir())


def test_a_gguf_file_is_converted_and_recorded(gguf: Path, into: Path):
    seen: list[ImportProgress] = []
    convert = FakeConverter()
    outcome = import_model(str(gguf), into=into, convert=convert, report=seen.append)
    model = outcome.model
    assert outcome.created
    assert (model.name, model.path, model.source) == ("Tiny-Model", into / "Tiny-Model", str(gguf))
    assert model.made == {"dtype": "bfloat16"}
    assert ImportProgress("writing", 0.5) in seen
    assert list_models(into) == [model]
    assert _left(into) == ["Tiny-Model"]


def test_what_was_made_is_readable_by_every_user(gguf: Path, into: Path):
    path = import_model(str(gguf), into=into, convert=FakeConverter()).model.path
    assert path.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_the_second_import_does_nothing(gguf: Path, into: Path, monkeypatch: pytest.MonkeyPatch):
    convert = FakeConverter()
    first = import_model(str(gguf), into=into, convert=convert)
    monkeypatch.chdir(gguf.parent)
    second = import_model(f"./{gguf.name}", into=into, convert=convert)
    assert (second.model, second.created) == (first.model, False)
    assert len(convert.calls) == 1


def test_what_was_imported_outlives_its_source(gguf: Path, into: Path):
    first = import_model(str(gguf), into=into, convert=FakeConverter())
    gguf.unlink()
    assert import_model(str(gguf), into=into, convert=FakeConverter()).model == first.model


def test_another_name_template_or_content_is_another_import(gguf: Path, into: Path, tmp_path: Path):
    convert = FakeConverter()
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    import_model(str(gguf), into=into, convert=convert)
    assert import_model(str(gguf), into=into, convert=convert, name="other").created
    assert import_model(str(gguf), into=into, convert=convert, name="templated", chat_template=template).created
    write_gguf(gguf, LLAMA | {"llama.block_count": 3}, [("token_embd.weight", (8, 8), 0)])
    assert import_model(str(gguf), into=into, convert=convert, name="changed").created
    assert [template for _, template in convert.calls] == [None, None, template, None]


def test_a_model_from_elsewhere_is_replaced_only_when_asked(gguf: Path, into: Path, tmp_path: Path):
    import_model(str(gguf), into=into, convert=FakeConverter(), name="m")
    other = write_gguf(tmp_path / "other.gguf", LLAMA, [("a", (8,), 0)])
    with pytest.raises(ImportFailed, match=r"a model made from .*Tiny Model.* is already there\n.*--name.*--force"):
        import_model(str(other), into=into, convert=FakeConverter(), name="m")
    assert list_models(into)[0].source == str(gguf)
    assert import_model(str(other), into=into, convert=FakeConverter(), name="m", force=True).created
    assert list_models(into)[0].source == str(other)
    assert _left(into) == ["m"]


def test_a_directory_of_someone_elses_is_not_replaced(gguf: Path, into: Path):
    (into / "m").mkdir(parents=True)
    with pytest.raises(ImportFailed, match="something that is no imported model is already there"):
        import_model(str(gguf), into=into, convert=FakeConverter(), name="m")


def test_a_link_that_leads_nowhere_is_in_the_way_until_forced(gguf: Path, into: Path):
    into.mkdir()
    (into / "m").symlink_to("/nowhere/at/all")
    with pytest.raises(ImportFailed, match="is already there"):
        import_model(str(gguf), into=into, convert=FakeConverter(), name="m")
    assert import_model(str(gguf), into=into, convert=FakeConverter(), name="m", force=True).created
    assert not (into / "m").is_symlink()


@pytest.mark.parametrize("failure", [ImportFailed("no"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing_behind(gguf: Path, into: Path, failure: BaseException):
    import_model(str(gguf), into=into, convert=FakeConverter(), name="before")
    with pytest.raises((ImportFailed, KeyboardInterrupt)):
        import_model(str(gguf), into=into, convert=FakeConverter(failure), name="m")  # type: ignore[arg-type]
    assert _left(into) == ["before"]


def test_a_conversion_that_writes_no_model_is_not_published(gguf: Path, into: Path):
    def convert(gguf: Path, out: Path, *, chat_template: Path | None, report: Report) -> Mapping[str, Any]:
        return {}

    with pytest.raises(ModelUnreadable, match=r"no config\.json"):
        import_model(str(gguf), into=into, convert=convert)
    assert _left(into) == []


def test_a_failed_replacement_keeps_the_old_model(gguf: Path, into: Path):
    import_model(str(gguf), into=into, convert=FakeConverter(), name="m")
    with pytest.raises(ImportFailed):
        import_model(str(gguf), into=into, convert=FakeConverter(ImportFailed("no")), name="m", force=True)
    assert [m.name for m in list_models(into)] == ["m"]


def test_leftovers_of_a_killed_import_are_removed(gguf: Path, into: Path):
    (into / ".partial-x" / "model").mkdir(parents=True)
    import_model(str(gguf), into=into, convert=FakeConverter())
    assert _left(into) == ["Tiny-Model"]


def test_two_imports_at_once_make_it_once(gguf: Path, into: Path):
    entered, go_on = threading.Event(), threading.Event()
    waiting = threading.Event()

    class Slow(FakeConverter):
        def __call__(self, *args: Any, **options: Any) -> Mapping[str, Any]:
            entered.set()
            assert go_on.wait(20)
            return super().__call__(*args, **options)

    def report(progress: ImportProgress) -> None:
        if "waiting for another import" in progress.stage:
            waiting.set()

    outcomes = {}

    def importing(name: str, convert: FakeConverter) -> None:
        outcomes[name] = import_model(str(gguf), into=into, convert=convert, report=report)

    first = threading.Thread(target=importing, args=("first", Slow()))
    first.start()
    assert entered.wait(20)
    second = threading.Thread(target=importing, args=("second", FakeConverter()))
    second.start()
    assert waiting.wait(20)
    go_on.set()
    first.join(20)
    second.join(20)
    assert {name: outcome.created for name, outcome in outcomes.items()} == {"first": True, "second": False}


def test_a_safetensors_directory_is_linked_and_its_modes_are_left_alone(tmp_path: Path, into: Path):
    source = write_model(tmp_path / "Own Model")
    (source / "model.safetensors").chmod(0o640)
    model = import_model(str(source), into=into, convert=FakeConverter()).model
    assert model.name == "Own-Model"
    assert (model.path / "model.safetensors").samefile(source / "model.safetensors")
    assert (source / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert import_model(str(source), into=into, convert=FakeConverter()).created is False


def test_a_template_given_with_a_directory_does_not_change_the_directory(tmp_path: Path, into: Path):
    source = write_model(tmp_path / "m")
    (source / "chat_template.jinja").write_text("old", encoding="utf-8")
    template = tmp_path / "new.jinja"
    template.write_text("new", encoding="utf-8")
    path = import_model(str(source), into=into, convert=FakeConverter(), chat_template=template).model.path
    assert (path / "chat_template.jinja").read_text(encoding="utf-8") == "new"
    assert (source / "chat_template.jinja").read_text(encoding="utf-8") == "old"


def test_a_directory_with_one_gguf_file_is_that_file(gguf: Path, into: Path):
    convert = FakeConverter()
    import_model(str(gguf.parent), into=into, convert=convert, name="m")
    assert convert.calls[0][0] == gguf


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 200])
def test_names_that_are_no_directory_names(gguf: Path, into: Path, name: str):
    with pytest.raises(ConfigError, match="no name for a directory"):
        import_model(str(gguf), into=into, convert=FakeConverter(), name=name)


def test_sources_that_are_nothing(tmp_path: Path, into: Path):
    with pytest.raises(ModelNotFound, match=r"needs no import\nWrite `source: org/name`"):
        import_model("org/name", into=into, convert=FakeConverter())
    with pytest.raises(ModelNotFound, match="no such file or directory"):
        import_model("./x.gguf", into=into, convert=FakeConverter())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnreadable, match=r"no config\.json and 0 GGUF files"):
        import_model(str(tmp_path / "empty"), into=into, convert=FakeConverter())
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelUnreadable, match="no GGUF file"):
        import_model(str(tmp_path / "bad.gguf"), into=into, convert=FakeConverter())
    with pytest.raises(ConfigError, match="chat template cannot be read"):
        import_model("./x.gguf", into=into, convert=FakeConverter(), chat_template=tmp_path / "absent.jinja")


def test_a_split_gguf_says_how_to_merge_it(tmp_path: Path, into: Path):
    for number in (1, 2):
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", LLAMA | {"split.count": 2}, [("a", (8,), 0)])
    with pytest.raises(ModelUnreadable, match="llama-gguf-split --merge"):
        import_model(str(tmp_path / "m-00001-of-00002.gguf"), into=into, convert=FakeConverter())


def test_too_little_room_is_told_before_the_conversion(tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch):
    gguf = write_gguf(tmp_path / "m.gguf", LLAMA, [("a", (2**18,), 0)])
    convert = FakeConverter()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ImportFailed, match=r"0\.1 GiB are needed on this file system, 0\.0 GiB are free\n.*--into DIR"):
        import_model(str(gguf), into=into, convert=convert)
    assert convert.calls == []


def test_a_models_directory_that_cannot_be_made(gguf: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ImportFailed, match="cannot be made"):
        import_model(str(gguf), into=tmp_path / "file" / "models", convert=FakeConverter())


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"version": 2}', '{"version": 1, "what": 3}'])
def test_records_that_are_not_ours_are_left_out_of_the_list(into: Path, record: str):
    write_model(into / "m")
    (into / "m" / RECORD).write_text(record, encoding="utf-8")
    assert list_models(into) == []
    assert list_models(into / "absent") == []


def test_the_record_holds_what_is_needed_to_make_the_model_again(gguf: Path, into: Path):
    path = import_model(str(gguf), into=into, convert=FakeConverter()).model.path
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    assert {"version", "source", "sha256", "chat_template_sha256", "made"} <= set(record)
