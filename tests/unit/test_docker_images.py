"""The Dockerfiles as far as can be told without building them."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from gateway.export.kubernetes.objects import USER
from placement.engines import INSTALLED_VERSIONS

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
ENTRYPOINT = ROOT / "docker" / "engine-entrypoint"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"
ONE_SLICE = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 1g.10gb     Device  0: (UUID: MIG-a-1)\n"
TWO_SLICES = ONE_SLICE + "  MIG 1g.10gb     Device  1: (UUID: MIG-b-2)\n"
WHOLE_CARD = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_the_linter_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([HADOLINT, "--no-color", path], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_is_copied_is_there_and_in_the_context(path: Path) -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists()
            assert source in allowed


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_run_as_the_user_that_the_manifests_name(path: Path) -> None:
    users = re.findall(r"^USER (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert users == [f"{USER}:{USER}"]


def test_the_engine_is_the_version_that_models_are_sized_for() -> None:
    text = (ROOT / "docker" / "engine.Dockerfile").read_text(encoding="utf-8")
    assert f"FROM vllm/vllm-openai:v{INSTALLED_VERSIONS['cuda']}\n" in text


@pytest.mark.parametrize(
    ("listed", "given", "seen"),
    [
        (ONE_SLICE, None, "MIG-a-1 /opt/vllm-plugin"),
        (TWO_SLICES, None, "none none"),
        (WHOLE_CARD, None, "none none"),
        ("", None, "none none"),
        (ONE_SLICE, "GPU-1", "GPU-1 none"),
    ],
)
def test_exactly_one_slice_is_named_to_the_engine(tmp_path: Path, listed: str, given: str | None, seen: str) -> None:
    (tmp_path / "listed").write_text(listed, encoding="utf-8")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat "{tmp_path}/listed"\n', encoding="utf-8")
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"CUDA_VISIBLE_DEVICES": given} if given else {})
    show = 'echo "${CUDA_VISIBLE_DEVICES:-none} ${PYTHONPATH:-none}"'
    done = subprocess.run(
        ["sh", str(ENTRYPOINT), "sh", "-c", show], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == seen
