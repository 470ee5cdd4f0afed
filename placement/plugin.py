"""Give an engine on a MIG slice the vLLM platform plugin, without installing anything into its environment.

Entry points are found through `*.dist-info` directories on the interpreter's path, so a directory with the plugin and one
such entry, put in front of `PYTHONPATH`, is enough; every process that the engine starts inherits it. The directory is
named after its content: an engine keeps the plugin it was started with while sliceway is upgraded around it.

The entry borrows the distribution name `sliceway`. Metadata of one name is read from the first place on the path only,
so in an environment that also has sliceway installed (`pip install sliceway[vllm]`) the plugin still shows up once: two
active platform plugins would be an error in vLLM.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from placement.errors import PlacementError
from placement.slices import Slice, SliceKind

PLUGIN_NAME = "sliceway_mig"  # of the entry point, and of the copied package
_SOURCE = "placement.vllm_plugin"
_GROUP = "vllm.platform_plugins"


def plugin_environment(target: Slice, directory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set, given the `environment` the engine would start with otherwise.

    Empty for every kind of slice but MIG. Makes the plugin's directory below `directory` where it is not there yet.
    `VLLM_PLUGINS`, where the operator set it, is an allow-list for platform plugins too, so the plugin is added to it.

    Raises PlacementError if the directory cannot be written.
    """
    if target.kind is not SliceKind.MIG:
        return {}
    entries = {"PYTHONPATH": first_on_path(install_plugin(directory), environment.get("PYTHONPATH", ""))}
    if (allowed := environment.get("VLLM_PLUGINS")) is not None:
        names = [name for name in allowed.split(",") if name]
        entries["VLLM_PLUGINS"] = ",".join(names if PLUGIN_NAME in names else [*names, PLUGIN_NAME])
    return entries


def install_plugin(directory: Path) -> Path:
    """The plugin as a directory for `PYTHONPATH`, below `directory`; made once per content, in one step.

    Raises PlacementError if it cannot be written.
    """
    return install_files(_plugin_files(), directory, "vllm-plugin", what="the vLLM plugin")


def install_files(files: Mapping[str, bytes], directory: Path, name: str, *, what: str) -> Path:
    """`files` (relative path -> content) as the directory `name-DIGEST` below `directory`; made once per content, in one step.

    Raises PlacementError, which calls them `what`, if they cannot be written.
    """
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    target = directory / f"{name}-{digest}"
    if target.is_dir():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make(files, target)
    except OSError as error:
        raise PlacementError(
            f"{what} cannot be put here: {error.strerror}",
            where=str(target),
            remedy="Set state_dir in the configuration to a directory you can write to.",
        ) from error
    return target


def _plugin_files() -> dict[str, bytes]:
    """Relative path -> content: the package's modules, and the metadata that makes it an entry point."""
    source = importlib.resources.files(_SOURCE)
    files = {
        f"{PLUGIN_NAME}/{entry.name}": entry.read_bytes() for entry in source.iterdir() if entry.name.endswith(".py")
    }
    # The version is what orders nothing and is shown to people who list the engine's distributions; the digest says more.
    metadata = (
        "Metadata-Version: 2.1\nName: sliceway\nVersion: 0+plugin\n"
        "Summary: vLLM platform plugin for MIG slices, put here by sliceway's controller\n"
    )
    files["sliceway-0+plugin.dist-info/METADATA"] = metadata.encode()
    files["sliceway-0+plugin.dist-info/entry_points.txt"] = (
        f"[{_GROUP}]\n{PLUGIN_NAME} = {PLUGIN_NAME}:register\n".encode()
    )
    return files


def _make(files: Mapping[str, bytes], target: Path) -> None:
    """Write beside `target`, then rename: another controller or a reader sees all of it or nothing."""
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name, content in files.items():
            path = draft / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # anything but "someone else has just made the same one"
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def first_on_path(directory: Path, rest: str) -> str:
    """`directory` before `rest`, and only once. Empty parts are dropped: they would mean the working directory."""
    parts = [part for part in rest.split(os.pathsep) if part and part != str(directory)]
    return os.pathsep.join([str(directory), *parts])
