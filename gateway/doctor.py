"""What is wrong with this machine for this configuration, and the command that mends it.

Every check is a function from what it looks at to findings; none of them changes anything.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.config import Config
from gateway.endpoint_keys import endpoint_keys
from gateway.errors import SecretUnavailable
from model_registry.errors import SlicewayError
from model_registry.schema import ModelConfig
from model_registry.source import resolve_source
from model_registry.words import are, counted
from placement.device_nodes import HostTree, Tree, examine_nodes
from placement.engines import EngineKind, describe_engine, find_engine_python
from placement.inventory import observe
from placement.simulate import enter
from placement.slices import Inventory, SliceKind
from placement.state import StatePaths
from placement.status import read_status
from placement.xids import kernel_log, same_bus, xids_in

Verdict = Literal["ok", "warning", "problem"]

# One connection is two descriptors in the gateway; 2,000 streams and some room.
_OPEN_FILES = 4_096
_FREE_DISK_BYTES = 5 * 2**30
_DRIVER = "/proc/driver/nvidia/version"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is a command or an instruction; empty where nothing is wrong."""

    check: str
    verdict: Verdict
    message: str
    remedy: str = ""


def examine(
    config: Config,
    *,
    environ: Mapping[str, str] | None = None,
    tree: Tree | None = None,
    read_log: Callable[[], Sequence[str] | None] = kernel_log,
) -> tuple[Finding, ...]:
    """Run every check. A check that cannot look says so as a finding; none stops the others.

    `tree` are the machine's device files, `read_log` gives its kernel's log. Of a simulated fleet the simulated machine is
    examined, which has neither.
    """
    enter(config.fleet, config.state)
    environment = os.environ if environ is None else environ
    findings: list[Finding] = []
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("system", _system),
        ("slices", lambda: _slices(config)),
        ("devices", lambda: _devices(config, tree or HostTree())),
        ("xid", lambda: _xids(config, read_log)),
        ("engine", lambda: _engine(config, environment)),
        ("models", lambda: _models(config, environment)),
        ("hub", lambda: _hub(environment)),
        ("state", lambda: _state(config)),
        ("gateway", lambda: _gateway(config)),
    )
    for name, check in checks:
        try:
            findings.extend(check())
        except SlicewayError as error:
            where = f"{error.where}: " if error.where else ""
            findings.append(Finding(name, "problem", f"{where}{error.message}", error.remedy or ""))
    return tuple(findings)


def _system() -> Iterator[Finding]:
    if sys.platform != "linux":
        yield Finding("system", "problem", f"sliceway needs Linux, this is {platform.system()}", "Run it on Linux.")
        return
    yield Finding(
        "system", "ok", f"Python {platform.python_version()} on Linux {platform.release()}, {platform.machine()}"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        remedy = (
            f"ulimit -n {_OPEN_FILES}"
            if hard >= _OPEN_FILES
            else "Raise nofile in /etc/security/limits.conf or LimitNOFILE= in the unit."
        )
        yield Finding(
            "system", "warning", f"only {soft} open files are allowed; each client connection takes two", remedy
        )


def _slices(config: Config) -> Iterator[Finding]:
    inventory = observe(config.fleet)
    wanted = sum(model.least_replicas for model in config.models if model.source)
    count = len(inventory.slices)
    have, asked = counted(count, "slice"), counted(wanted, "replica")
    kinds = ", ".join(
        f"{sum(s.kind is kind for s in inventory.slices)} {kind}"
        for kind in SliceKind
        if any(s.kind is kind for s in inventory.slices)
    )
    if config.fleet.partition == "planned":
        told = f"{have} so far ({kinds or 'none'}) for {asked}; `sliceway plan` shows what is cut"
        yield Finding("slices", "ok", told)
    elif count < wanted:
        yield Finding(
            "slices",
            "problem",
            f"{asked} {are(wanted)} configured for {have} ({kinds or 'none'})",
            "Lower `replicas`, or cut more slices.",
        )
    else:
        yield Finding("slices", "ok", f"{have} ({kinds or 'none'}) for {asked}")
    for note in inventory.notes:
        yield Finding("slices", "warning", note)
    ours = _engine_groups(config)
    for user in inventory.users:
        if _group(user.pid) in ours:
            continue
        yield Finding(
            "slices",
            "warning",
            f"process {user.pid} ({user.name}) runs on slice {user.slice_id}",
            f"If it is not sliceway's: kill {user.pid}",
        )


def _engine_groups(config: Config) -> set[int]:
    """The process groups of the engines that a controller runs for this configuration."""
    status = read_status(StatePaths(config.state).controller_status)
    pids = [row.engine_pid for row in status.replicas if row.engine_pid] if status is not None else []
    return {group for pid in pids if (group := _group(pid)) is not None}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _devices(config: Config, tree: Tree) -> Iterator[Finding]:
    """Device files and capabilities: without them the driver lists a slice, and no engine can open it."""
    gpus = observe(config.fleet).gpus
    if any(gpu.simulated for gpu in gpus) or not (gpus or tree.exists(_DRIVER)):
        return
    findings = examine_nodes(gpus, tree, cuts=bool(config.fleet.layouts))
    for found in findings:
        yield Finding("devices", "problem" if found.needed else "warning", found.message, found.remedy)
    if not any(found.needed for found in findings):
        slices = sum(len(gpu.instances) if gpu.mig else 1 for gpu in gpus)
        yield Finding("devices", "ok", f"this user may open the device files of {counted(slices, 'slice')}")


def _xids(config: Config, read_log: Callable[[], Sequence[str] | None]) -> Iterator[Finding]:
    """Errors that GPUs have had since boot, where something is to be done about them."""
    gpus = [gpu for gpu in observe(config.fleet).gpus if not gpu.simulated]
    if not gpus:
        return
    lines = read_log()
    if lines is None:
        yield Finding("xid", "ok", "the kernel's log is not this user's to read; errors of GPUs: sudo dmesg | grep Xid")
        return
    for xid in xids_in(lines):
        gpu = next((g for g in gpus if same_bus(g.pci_bus, xid.bus)), None)
        times = f", {xid.count} times" if xid.count > 1 else ""
        message = f"{gpu.label if gpu else xid.bus}: {xid.meaning} (XID {xid.number}{times})"
        yield Finding(
            "xid", "problem" if xid.urgent else "warning", message, xid.remedy(str(gpu.index if gpu else xid.bus))
        )


def engine_kinds(inventory: Inventory) -> tuple[EngineKind, ...]:
    """Which builds of vLLM these slices need."""
    cpu = any(s.kind is SliceKind.CPU for s in inventory.slices)
    cuda = any(s.kind is not SliceKind.CPU for s in inventory.slices)
    return (*(("cpu",) if cpu else ()), *(("cuda",) if cuda else ()))


def _engine(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    if config.engine.command:
        yield _command(config.engine.command[0])
        return
    if not any(model.source for model in config.models):
        yield Finding("engine", "ok", "no model is run by sliceway itself, so no engine is needed")
        return
    inventory = observe(config.fleet)
    if inventory.slices and all(s.simulated for s in inventory.slices):
        yield Finding("engine", "ok", "simulated slices run simulated engines, which answer nothing true")
        return
    for kind in engine_kinds(inventory):
        found = describe_engine(find_engine_python(kind, config.engine.python, environ=environ))
        install = f"sliceway engine install --kind {kind}"
        if found.kind is None:
            yield Finding("engine", "problem", f"{found.python} has no vLLM", install)
        elif kind == "cpu" and "+cpu" not in (found.torch or ""):
            yield Finding(
                "engine",
                "problem",
                f"PyTorch {found.torch} beside vLLM's CPU build is not a CPU build",
                f"{install} --force",
            )
        else:
            yield Finding("engine", "ok", f"vLLM {found.vllm} ({found.kind}), PyTorch {found.torch}")


def _command(program: str) -> Finding:
    if shutil.which(program):
        return Finding("engine", "ok", f"engine.command runs {program}")
    return Finding(
        "engine", "problem", f"engine.command names {program!r}, which is no program here", "Give its full path."
    )


def _elsewhere(model: ModelConfig, environ: Mapping[str, str]) -> Finding:
    try:
        endpoint_keys((model,), environ)
    except SecretUnavailable as error:
        where = f" ({error.where})" if error.where else ""
        return Finding("models", "problem", f"{error.message}{where}", error.remedy or "")
    shown = ", shown a key" if model.endpoint_key else ""
    return Finding(
        "models", "ok", f"{model.name}: {counted(len(model.endpoints), 'endpoint')} run by something else{shown}"
    )


def _models(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    for model in config.models:
        if not model.source:
            yield _elsewhere(model, environ)
            continue
        try:
            if model.metadata is not None:
                spec = resolve_source(model.metadata)
            else:
                spec = resolve_source(model.source, revision=model.revision, environ=environ)
        except SlicewayError as error:
            yield Finding("models", "problem", f"{model.name}: {error.message}", error.remedy or "")
            continue
        here = spec.path is not None and model.metadata is None
        where = "on this machine" if here else "on the hub; its weights are fetched at the first start"
        yield Finding("models", "ok", f"{model.name}: {spec.architecture}, {spec.task}, {where}")
        if spec.task == "generate" and not (spec.has_chat_template or model.chat_template):
            yield Finding(
                "models",
                "warning",
                f"{model.name} has no chat template: /v1/chat/completions will refuse it",
                "Set chat_template to a Jinja file.",
            )


def _hub(environ: Mapping[str, str]) -> Iterator[Finding]:
    home = environ.get("HF_HOME") or "~/.cache/huggingface"
    token = "with a token" if environ.get("HF_TOKEN") else "without a token (gated models need HF_TOKEN)"
    offline = ", offline mode" if environ.get("HF_HUB_OFFLINE") in {"1", "true", "yes", "on"} else ""
    yield Finding("hub", "ok", f"models are cached in {home}, {token}{offline}")


def _state(config: Config) -> Iterator[Finding]:
    existing = next(p for p in (config.state, *config.state.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("state", "problem", f"{existing} is not writable", f"chown -R $USER {existing}, or set state_dir")
        return
    free = shutil.disk_usage(existing).free
    if free < _FREE_DISK_BYTES:
        yield Finding(
            "state",
            "warning",
            f"{free / 2**30:.1f} GiB free under {existing}",
            "Engines' caches and logs need a few GiB.",
        )
    else:
        yield Finding("state", "ok", f"{config.state}, {free / 2**30:.0f} GiB free")


def _gateway(config: Config) -> Iterator[Finding]:
    host, _, port = config.gateway.listen.rpartition(":")
    reason = _why_not_bindable(host.strip("[]"), int(port))
    if reason:
        yield Finding(
            "gateway",
            "warning",
            f"{config.gateway.listen}: {reason}",
            "If that is not sliceway itself, set gateway.listen to a free port.",
        )
    else:
        yield Finding("gateway", "ok", f"{config.gateway.listen} is free")
    if config.gateway.authentication == "none" and not _is_loopback(host.strip("[]")):
        yield Finding(
            "gateway",
            "problem",
            "anyone who reaches this address may use every model",
            "Set gateway.authentication: keys",
        )


def _why_not_bindable(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "something listens there" if error.errno == errno.EADDRINUSE else str(error)
    return ""


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def default_config_path(directory: Path = Path()) -> Path | None:
    """`sliceway.yaml` in `directory`, if there is one."""
    path = directory / "sliceway.yaml"
    return path if path.is_file() else None
