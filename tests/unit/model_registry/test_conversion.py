"""The converter as a subprocess: its lines become progress, and each way it can end has its words."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from model_registry.conversion import EngineConverter, ImportProgress
from model_registry.errors import ImportFailed

_ARGUMENTS = """
import argparse, json, os, signal, sys
parser = argparse.ArgumentParser()
for option in ("--gguf", "--out", "--fallback-template", "--chat-template"):
    parser.add_argument(option)
options = parser.parse_args()
def say(**line): print(json.dumps(line), flush=True)
"""


def _converter(tmp_path: Path, body: str) -> EngineConverter:
    program = tmp_path / "program.py"
    program.write_text(_ARGUMENTS + body, encoding="utf-8")
    return EngineConverter(lambda: Path(sys.executable), program=program)


def _run(converter: EngineConverter, tmp_path: Path, seen: list[ImportProgress] | None = None):
    return converter(
        tmp_path / "m.gguf", tmp_path / "out", chat_template=None, report=(seen if seen is not None else []).append
    )


def test_progress_and_result_come_through_and_other_output_does_not_matter(tmp_path: Path):
    seen: list[ImportProgress] = []
    body = """
assert os.path.isabs(options.gguf) and "User:" in open(options.fallback_template).read()
assert options.chat_template.endswith("t.jinja") and os.environ["HF_HUB_OFFLINE"] == "1"
say(stage="reading", fraction=0.25); print("noise"); print('"a string"'); say(stage="writing", fraction=0.5)
say(result={"dtype": "bfloat16"})
"""
    converter = _converter(tmp_path, body)
    made = converter(tmp_path / "m.gguf", tmp_path / "out", chat_template=tmp_path / "t.jinja", report=seen.append)
    assert made == {"dtype": "bfloat16"}
    assert seen == [ImportProgress("reading", 0.25), ImportProgress("writing", 0.5)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("say(error='no such tensor', kind='KeyError'); sys.exit(1)", "the conversion failed: no such tensor"),
        (
            "say(error='No module named gguf', kind='ModuleNotFoundError'); sys.exit(1)",
            r"lacks a library: No module named gguf\nsliceway engine install --force",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed, most likely because memory ran out"),
        (
            "print('first', file=sys.stderr); raise RuntimeError('it broke')",
            "ended with status 1: RuntimeError: it broke",
        ),
        ("sys.exit(3)", "ended with status 3: it said nothing"),
        ("say(stage='done')", "ended with status 0"),
    ],
)
def test_each_end_has_its_words(tmp_path: Path, body: str, message: str):
    with pytest.raises(ImportFailed, match=message) as caught:
        _run(_converter(tmp_path, body), tmp_path)
    assert caught.value.where == sys.executable


def test_an_interpreter_that_does_not_run(tmp_path: Path):
    with pytest.raises(
        ImportFailed, match=r"interpreter does not run: No such file or directory\nsliceway engine install"
    ):
        _run(EngineConverter(lambda: tmp_path / "absent"), tmp_path)


def test_an_interrupted_import_leaves_no_process_behind(tmp_path: Path):
    def interrupt(progress: ImportProgress) -> None:
        raise KeyboardInterrupt

    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); say(stage='reading', fraction=0); signal.pause()"
    with pytest.raises(KeyboardInterrupt):
        _converter(tmp_path, body)(tmp_path / "m.gguf", tmp_path / "out", chat_template=None, report=interrupt)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_modules_beside_the_program_shadow_nothing(tmp_path: Path):
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    made = _run(_converter(tmp_path, "import random; say(result={'safe': sys.flags.isolated})"), tmp_path)
    assert made == {"safe": 1}
