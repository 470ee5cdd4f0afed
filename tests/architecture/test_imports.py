from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model_registry", "placement", "gateway", "loadtests")
OTHER_PROCESSES = {
    "gateway.cli.__main__": "is run, never imported",
    "loadtests.__main__": "is run, never imported",
    "loadtests.locustfile": "Locust loads it, patched for gevent",
    "loadtests.run": "imports Locust, which patches the process for gevent",
    "loadtests.users": "imports Locust, which patches the process for gevent",
    "loadtests.worker": "patches its own process for gevent",
    "placement.cluster.asking": "imports Ray, as `placement.cluster.actors` does",
    "placement.cluster.actors": "imports Ray, which sets variables of its own; loaded by who uses a cluster",
    "placement.cluster.owners": "imports Ray, as `placement.cluster.actors` does",
    "placement.cluster.start": "imports Ray, as above",
    "placement.vllm_plugin": "vLLM loads it inside the engine",
    "model_registry.convert_gguf": "runs on the engine's interpreter, where PyTorch is",
}
"""Modules that are never imported into a process of ours, and why."""


def modules() -> list[str]:
    """Every module of ours that our own processes import."""
    found = []
    for package in PACKAGES:
        found.append(package)
        found += [m.name for m in pkgutil.walk_packages([str(ROOT / package)], f"{package}.", onerror=lambda _: None)]
    return [
        name for name in found if not any(name == other or name.startswith(f"{other}.") for other in OTHER_PROCESSES)
    ]


# Runs first in a fresh interpreter. Anything in the list below that an import does is an effect, and raises.
GUARD = """
import importlib, json, os, sys, threading

def effect(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
            raise RuntimeError(f"opens {path!r} for writing")
    elif event in BANNED or (event == "ctypes.dlopen" and "nvidia" in str(arguments[0])):
        raise RuntimeError(f"does {event} {arguments!r:.120}")

BANNED = {"socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork", "os.posix_spawn",
          "os.mkdir", "os.remove", "os.rename", "os.putenv", "os.unsetenv", "os.chdir", "os.kill", "signal.pthread_kill"}
sys.addaudithook(effect)
before, found = dict(os.environ), {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
    if threading.active_count() > 1:
        found.setdefault(name, "starts a thread")
    if dict(os.environ) != before:
        found.setdefault(name, "changes the environment")
        before = dict(os.environ)
for banned in ("vllm", "torch", "transformers", "ray", "locust", "gevent", "openai"):
    if banned in sys.modules:
        found[banned] = "was imported by one of them"
print(json.dumps(found))
"""


def test_importing_any_module_does_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", GUARD, json.dumps(modules())],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=50,
        cwd=ROOT,
    )
    assert json.loads(done.stdout) == {}


def test_the_guard_would_notice() -> None:
    """A guard that lets everything pass would make the test above worthless."""
    code = GUARD.replace("sys.addaudithook(effect)", "sys.addaudithook(effect)\nsys.path.insert(0, sys.argv[2])")
    effects = {
        "binds": "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "spawns": "import subprocess; subprocess.Popen(['true'])",
        "writes": "open('/tmp/never', 'w')",
        "threads": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "environment": "import os; os.environ['X_Y_Z'] = '1'",
    }
    with_effects = (
        "import types, sys, importlib.abc, importlib.util\nSOURCES = "
        + repr(effects)
        + (
            "\nclass Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        return importlib.util.spec_from_loader(name, self) if name in SOURCES else None\n"
            "    def exec_module(self, module):\n"
            "        exec(SOURCES[module.__name__], module.__dict__)\n"
            "sys.meta_path.insert(0, Finder())\n"
        )
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", with_effects + code, json.dumps(list(effects)), "."],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=50,
    )
    assert set(json.loads(done.stdout)) == set(effects)


def test_the_list_of_exceptions_has_no_strangers() -> None:
    for name in OTHER_PROCESSES:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{name} is gone; take it off the list"


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=50,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [m for m in modules() if (ROOT / m.replace(".", "/") / "__init__.py").exists()])
def test_a_package_exports_exactly_what_it_says(name: str) -> None:
    package = importlib.import_module(name)
    exported = list(getattr(package, "__all__", ()))
    public = {
        n
        for n, value in vars(package).items()
        if not n.startswith("_") and n != "annotations" and type(value).__name__ != "module"
    }
    if name == "gateway.cli":
        public -= {"run", "app", "main"}  # the console script's module, not a library
    assert set(exported) == public
    assert exported == sorted(exported), "keep __all__ sorted"
