"""MPS servers, one per shared GPU: started when the first engine on it is, ended when the controller ends.

They outlive the controller that started them, as engines do; the next one finds them by their pipe directory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from placement.errors import PlacementError

PROGRAM = "nvidia-cuda-mps-control"
_SECONDS = 20.0


def ensure_server(gpu: str, directory: Path, environ: Mapping[str, str], *, program: str = PROGRAM) -> None:
    """Start the MPS control daemon of one GPU, by UUID, unless it runs. It starts the server with its first client.

    Raises PlacementError, with the daemon's own words, where it cannot be started.
    """
    if running(directory):
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {**environ, **_environment(directory), "CUDA_VISIBLE_DEVICES": gpu}
    try:
        done = subprocess.run(
            [program, "-d"],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlacementError(
            f"MPS could not be started: {error}",
            where=gpu,
            remedy="It comes with the driver (package nvidia-compute-utils); without it, share with kind: time-slice.",
        ) from error
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split()) or f"exit status {done.returncode}"
        raise PlacementError(
            f"MPS could not be started: {words}", where=gpu, remedy=f"See {directory}/log/control.log."
        )


def running(directory: Path) -> bool:
    """Whether the daemon of this directory runs."""
    try:
        pid = int((directory / f"{PROGRAM}.pid").read_text(encoding="utf-8"))
        os.kill(pid, 0)
    except (OSError, ValueError):
        return False
    return True


def end_servers(runtime: Path, environ: Mapping[str, str], *, program: str = PROGRAM) -> None:
    """Ask every MPS daemon below `runtime` to quit."""
    for directory in runtime.glob("mps-*"):
        if not running(directory):
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [program],
                env={**environ, **_environment(directory)},
                input="quit\n",
                capture_output=True,
                encoding="utf-8",
                timeout=_SECONDS,
                check=False,
            )


def _environment(directory: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(directory), "CUDA_MPS_LOG_DIRECTORY": str(directory / "log")}
