"""Running `convert_gguf.py` in an engine's interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, Protocol

from model_registry.errors import ImportFailed


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """What an import does at the moment. `fraction` is of this stage's whole, from 0 to 1; None where it cannot be told."""

    stage: str
    fraction: float | None = None


Report = Callable[[ImportProgress], None]


class Converter(Protocol):
    """Makes a directory that an engine serves out of a GGUF file."""

    def __call__(self, gguf: Path, out: Path, *, chat_template: Path | None, report: Report) -> Mapping[str, Any]:
        """Write the model into `out` and return what was made, for the record. Raises ImportFailed."""


class EngineConverter:
    """The real one: a subprocess in the interpreter that `find_python` gives, which has torch, transformers and gguf.

    The interpreter is looked for when it is needed: most sources need no conversion.
    """

    def __init__(self, find_python: Callable[[], Path], *, program: Path | None = None) -> None:
        self._find_python = find_python
        self._program = program

    def __call__(self, gguf: Path, out: Path, *, chat_template: Path | None, report: Report) -> Mapping[str, Any]:
        """See Converter. The subprocess is in a session of its own and ends with this call, however this call ends."""
        python = self._find_python()
        package = resources.files("model_registry")
        with (
            resources.as_file(package / "convert_gguf.py") as program,
            resources.as_file(package / "data" / "transcript.jinja") as fallback,
        ):
            # -I: the program's own directory holds modules whose names would shadow others.
            command = [
                str(python),
                "-I",
                str(self._program or program),
                "--gguf",
                str(gguf.absolute()),
                "--out",
                str(out),
            ]
            command += ["--fallback-template", str(fallback)]
            command += ["--chat-template", str(chat_template.absolute())] if chat_template else []
            with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
                return _result_of(_Run(command, log), report)


class _Run:
    """One run of the converter: its lines while it runs, then how it ended."""

    def __init__(self, command: list[str], log: IO[str]) -> None:
        self.command = command
        self.log = log

    def lines(self) -> Any:
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        try:
            process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                stderr=self.log,
                encoding="utf-8",
                env=environ,
                start_new_session=True,
            )
        except OSError as error:
            raise ImportFailed(
                f"the engine's interpreter does not run: {error.strerror or error}",
                where=self.command[0],
                remedy="sliceway engine install",
            ) from error
        try:
            assert process.stdout is not None
            with process.stdout:
                yield from process.stdout
            self.status = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read()[-4000:].splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def _result_of(run: _Run, report: Report) -> Mapping[str, Any]:
    answer: dict[str, Any] = {}
    for line in run.lines():
        answer = _parsed(line)
        if "stage" in answer:
            report(ImportProgress(str(answer["stage"]), float(answer.get("fraction", 0.0))))
    if run.status == 0 and isinstance(answer.get("result"), dict):
        return dict(answer["result"])
    raise _failure(run, answer)


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _failure(run: _Run, answer: Mapping[str, Any]) -> ImportFailed:
    where = run.command[0]
    if run.status == -signal.SIGKILL:
        return ImportFailed(
            "the conversion was killed, most likely because memory ran out",
            where=where,
            remedy="It needs about eight bytes for each of the model's parameters; close something or take a larger machine.",
        )
    if answer.get("kind") in ("ImportError", "ModuleNotFoundError"):
        return ImportFailed(
            f"the engine's environment lacks a library: {answer['error']}",
            where=where,
            remedy="sliceway engine install --force",
        )
    reason = answer.get("error") or f"it ended with status {run.status}: {run.last_words()}"
    return ImportFailed(
        f"the conversion failed: {reason}",
        where=where,
        remedy="If the architecture is not supported, take the original model's safetensors: source: org/name",
    )
