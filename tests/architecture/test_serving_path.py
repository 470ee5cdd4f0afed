"""What a gateway process is made of: raw connections and aiohttp; no slow client, no tokenizer, no Ray between client and engine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("model_registry", "placement", "gateway", "loadtests")
SLOW_CLIENTS = {"httpx", "httpx2", "requests", "urllib3"}
NOT_IN_A_GATEWAY = SLOW_CLIENTS | {
    *("ray", "vllm", "torch", "transformers", "tokenizers", "tiktoken", "sentencepiece", "litellm", "openai", "locust"),
}

# Makes the gateway as `sliceway gateway` does, up to where it would listen.
MAKE = """
import json, sys
import gateway.cli.serve, gateway.ingress.server, gateway.wiring
from gateway.config import Config
config = Config.model_validate({"version": "v1", "state_dir": sys.argv[1], "models": [{"name": "m", "source": "x"}]})
made, app = gateway.wiring.create_gateway(config)
gateway.wiring.server_config(config, app, made.tls).load()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(source: str) -> Iterator[str]:
    """The top-level packages that a module's source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_no_module_of_ours_imports_a_slow_client() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in SLOW_CLIENTS & set(imported(path.read_text(encoding="utf-8")))
    }
    assert found == set()


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "import httpx.x\nfrom requests import get\ndef f():\n    from urllib3 import a\nfrom . import httpx2\n"
    assert SLOW_CLIENTS & set(imported(source)) == {"httpx", "requests", "urllib3"}


def test_a_gateway_process_has_no_slow_client_no_tokenizer_and_no_ray_in_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", MAKE, str(tmp_path)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=50,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"gateway", "aiohttp", "httptools", "msgspec"} <= loaded, "it was made"
    assert not NOT_IN_A_GATEWAY & loaded
