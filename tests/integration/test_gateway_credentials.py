"""Credentials end to end: tokens of an issuer that is really asked for its keys, and secrets that come out nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.auth.testing import FakeIssuer
from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import RELAYS, fake_fleet, running_gateway, wait_until
from gateway.wiring import wall_clock
from tests.integration.certificates import write_pair
from tests.integration.gateway_harness import CHAT, chat_body
from tests.integration.test_admin_api import listener_of

pytestmark = pytest.mark.integration


@contextmanager
def serving(issuer: FakeIssuer) -> Iterator[str]:
    """The issuer's documents over HTTP; its own name becomes the server's address."""

    class Documents(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {
                "/.well-known/openid-configuration": lambda: json.dumps(
                    {"issuer": issuer.issuer, "jwks_uri": f"{issuer.issuer}/keys"}
                ).encode(),
                "/keys": issuer.key_set,
            }.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found() if found else b"")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Documents) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        issuer.issuer = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield issuer.issuer
        finally:
            server.shutdown()
            thread.join()


def ask(url: str, credential: str, model: str = "m") -> httpx2.Response:
    body = chat_body(model, stream=False, max_tokens=1)
    return httpx2.post(url + CHAT, json=body, headers={"authorization": f"Bearer {credential}"}, timeout=30)


@pytest.mark.parametrize("relay", sorted(RELAYS))
def test_tokens_of_the_issuer_open_what_their_tenant_may_use(relay: str, tmp_path: Path) -> None:
    issuer = FakeIssuer()
    issuer.add("first")
    with serving(issuer) as address:
        config = Config.model_validate(
            {
                "version": "v1",
                "state_dir": str(tmp_path / "state"),
                "models": [{"name": "m", "source": "x"}, {"name": "n", "source": "x"}],
                "tenants": [{"name": "acme", "models": ["m"]}],
                "auth": {"oidc": {"issuer": address, "audience": "sliceway"}},
                "gateway": {"listen": "127.0.0.1:0", "admin_listen": "none"},
            }
        )
        key, _ = Keystore(tmp_path / "state").create("acme", now=wall_clock())
        with fake_fleet(tmp_path / "state") as fleet, running_gateway(config, relay=relay) as running:
            fleet.start("m-0", "m", ttft_seconds=0.0, itl_seconds=0.0)
            running.look()
            token = issuer.token("first", now=wall_clock())
            wait_until(lambda: ask(running.url, token).status_code == 200, what="the issuer's keys are there")
            assert ask(running.url, token, "n").status_code == 404
            assert ask(running.url, key).status_code == 200, "keys go on beside tokens"
            for wrong in (
                issuer.token("first", now=wall_clock() - 3600),
                issuer.token("first", now=wall_clock(), tenant="ghost"),
                token[:-6] + "AAAAAA",
                "a.b.c",
            ):
                refused = ask(running.url, wrong)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_token")
                assert wrong not in refused.text
            wait_until(lambda: running.idle, what="all counters are back at zero")


@pytest.mark.timeout(240)  # ten processes that each import the command line
def test_no_secret_comes_out_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    """Planted in every place that holds one; then everything that is printed, logged, answered or stored is searched."""
    planted = {
        "PLANTED_PEPPER": "planted-pepper-0123456789abcdef",
        "PLANTED_ADMIN": "planted-admin-0123456789abcdef",
        "PLANTED_TLS": "planted-tls-0123456789abcdef",
    }
    write_pair(tmp_path / "tls", "site", password=planted["PLANTED_TLS"].encode())
    state = tmp_path / "state"
    plain = {
        "version": "v1",
        "state_dir": str(state),
        "models": [{"name": "m", "source": "x"}],
        "tenants": [{"name": "acme"}],
        "gateway": {
            "listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "keys_secret": "${ENV:PLANTED_PEPPER}",
            "admin_key": f"file:{tmp_path}/admin.txt",
            "tls": {
                "certificate": str(tmp_path / "tls/certificate.pem"),
                "key": str(tmp_path / "tls/key.pem"),
                "key_password": "${ENV:PLANTED_TLS}",
            },
        },
    }
    (tmp_path / "admin.txt").write_text(planted["PLANTED_ADMIN"], encoding="utf-8")
    config_path = tmp_path / "sliceway.yaml"
    config_path.write_text(json.dumps(plain), encoding="utf-8")
    environ = os.environ | planted
    said = [said_by(environ, *words, str(config_path)) for words in COMMANDS]
    made = json.loads(said[0])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in planted.items():
            patch.setenv(name, value)
        said += answers(Config.model_validate(plain), config_path, made["key"], planted["PLANTED_ADMIN"])
    captured = capfd.readouterr()
    said += [captured.out, captured.err, caplog.text]
    said += [path.read_bytes().decode("latin-1") for path in state.rglob("*") if path.is_file()]
    everything = "\n".join(said).replace(json.dumps(made["key"]), "")  # the one place where it is shown
    for secret in (*planted.values(), made["key"], made["key"].split("-", 3)[3], "planted-guess"):
        assert secret not in everything, secret


COMMANDS = (
    ("keys", "create", "acme", "--json", "-c"),
    ("keys", "list", "--json", "-c"),
    ("keys", "revoke", "sk-planted-guess-of-a-key-that-is-longer-than-any-id-could-be", "--json", "-c"),
    ("tenants", "list", "--json", "-c"),
    ("tenants", "set", "acme", "weight=planted-guess", "-c"),
    ("audit", "show", "-c"),
    ("audit", "verify", "--json", "-c"),
    ("plan", "--json"),
    ("status", "--json"),
)


def said_by(environ: dict[str, str], *words: str) -> str:
    code = "from gateway.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
        env=environ,
    )
    return done.stdout + done.stderr


def answers(config: Config, config_path: Path, key: str, admin_key: str) -> list[str]:
    """What a gateway says, on both listeners, to good and to wrong requests."""
    with running_gateway(config, config_path=config_path) as running:
        address = wait_until(lambda: listener_of(running).serving, what="the admin API is served")
        with httpx2.Client(verify=False, base_url=running.url, headers={"authorization": f"Bearer {key}"}) as client:
            got = [
                client.get(path) for path in ("/v1/models", "/readyz", "/metrics", "/slices", "/openapi.json", "/no")
            ]
            got.append(client.post(CHAT, json={"model": "planted-gues", "messages": []}))
            got.append(client.post(CHAT, content=b'{"model": '))
            got.append(client.get("/v1/models", headers={"authorization": f"Bearer {key}x"}))
        with httpx2.Client(base_url=f"http://{address}") as client:
            good = {"authorization": f"Bearer {admin_key}"}
            got += [client.get(f"/admin/{name}", headers=good) for name in ("keys", "tenants", "audit", "audit/verify")]
            got.append(client.post("/admin/keys", headers=good, json={"tenant": "acme", "planted": "planted-guess"}))
            got.append(client.patch("/admin/tenants/acme", headers=good, json={"weight": "planted-guess"}))
            got.append(client.get("/admin/keys", headers={"authorization": "Bearer planted-guess"}))
        config_path.write_text(
            config_path.read_text(encoding="utf-8").replace("${ENV:PLANTED_PEPPER}", "planted-guess"), encoding="utf-8"
        )
        running.on_loop(running.gateway.reload)
        return [answer.text + str(answer.headers) for answer in got]
