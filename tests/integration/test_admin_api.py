"""The admin API on its own listener: who may use it, what it changes in every gateway, and that all of it is written down."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.admin.listener import AdminListener
from gateway.audit import AuditLog
from gateway.config import Config
from gateway.testing import FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from tests.integration.gateway_harness import CHAT, chat_body

pytestmark = pytest.mark.integration


def settings(folder: Path, **gateway: Any) -> dict[str, Any]:
    return {
        "version": "v1",
        "state_dir": str(folder / "state"),
        "models": [{"name": "m", "source": "x"}, {"name": "outside", "endpoints": ["http://127.0.0.1:9"]}],
        "tenants": [{"name": "acme", "models": ["m"]}],
        "gateway": {"listen": "127.0.0.1:0"} | gateway,
    }


@dataclass
class Site:
    """Two gateways on one state directory, and a client of the admin API that one of them serves."""

    gateways: tuple[RunningGateway, RunningGateway]
    fleet: FakeFleet
    config_path: Path
    admin: httpx2.Client
    address: str

    @property
    def state(self) -> Path:
        return self.config_path.parent / "state"

    def ask(self, key: str, model: str = "m") -> list[int]:
        """What each gateway answers to a completion with this key."""
        body = chat_body(model, stream=False, max_tokens=1)
        headers = {"authorization": f"Bearer {key}"}
        return [httpx2.post(g.url + CHAT, json=body, headers=headers, timeout=30).status_code for g in self.gateways]

    def eventually(self, key: str, status: int, model: str = "m") -> None:
        wait_until(lambda: self.ask(key, model) == [status] * 2, what=f"both gateways answer {status}")

    def make_key(self, **fields: Any) -> dict[str, Any]:
        made = self.admin.post("/admin/keys", json={"tenant": "acme"} | fields)
        assert made.status_code == 201, made.text
        return dict(made.json())


def listener_of(gateway: RunningGateway) -> AdminListener:
    assert isinstance(gateway.gateway.admin, AdminListener)
    return gateway.gateway.admin


@contextmanager
def site(folder: Path, **gateway: Any) -> Iterator[Site]:
    path = folder / "sliceway.yaml"
    path.write_text(json.dumps(settings(folder, **gateway)), encoding="utf-8")
    config = Config.model_validate(settings(folder, **gateway))
    with ExitStack() as stack:
        fleet = stack.enter_context(fake_fleet(folder / "state"))
        fleet.start("m-0", "m", ttft_seconds=0.0, itl_seconds=0.0)
        first, second = (stack.enter_context(running_gateway(config, config_path=path)) for _ in range(2))
        serving = wait_until(
            lambda: listener_of(first).serving or listener_of(second).serving, what="one of them serves administrators"
        )
        if serving.startswith("unix:"):
            transport = httpx2.HTTPTransport(uds=serving.removeprefix("unix:"))
            client = httpx2.Client(transport=transport, base_url="http://admin", timeout=30)
        else:
            client = httpx2.Client(base_url=f"http://{serving}", timeout=30)
        for one in (first, second):
            one.look()
        yield Site((first, second), fleet, path, stack.enter_context(client), serving)
        for one in (first, second):
            wait_until(lambda one=one: one.idle, what="all counters are back at zero")  # type: ignore[misc]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as made:
        yield made


def test_one_of_the_gateways_serves_a_socket_of_this_user_alone(shared: Site) -> None:
    mode = Path(shared.address.removeprefix("unix:")).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert sum(listener_of(g).serving is not None for g in shared.gateways) == 1


def test_the_public_listener_knows_nothing_of_it(shared: Site) -> None:
    for path in ("/admin/keys", "/admin/tenants", "/admin/audit"):
        assert httpx2.get(shared.gateways[0].url + path).status_code == 404


def test_a_key_is_made_handed_over_and_revoked_in_every_gateway(shared: Site) -> None:
    first = shared.make_key(name="ci")
    shared.eventually(first["key"], 200)
    rotated = shared.admin.post(f"/admin/keys/{first['id']}/rotate", json={"overlap_seconds": 3600}).json()
    assert rotated["replaces"] == first["id"] == rotated["replaced"]["id"]
    shared.eventually(rotated["key"], 200)
    assert shared.ask(first["key"]) == [200, 200], "the old key goes on during the overlap"
    assert shared.admin.post(f"/admin/keys/{first['id']}/revoke").json()["state"] == "revoked"
    shared.eventually(first["key"], 401)
    assert shared.ask(rotated["key"]) == [200, 200]
    listed = {key["id"]: key for key in shared.admin.get("/admin/keys", params={"tenant": "acme"}).json()["keys"]}
    assert listed[first["id"]]["state"] == "revoked"
    assert "key" not in listed[rotated["id"]]
    assert "digest" not in listed[rotated["id"]]


def test_a_tenant_is_changed_and_changed_back(shared: Site) -> None:
    key = shared.make_key()["key"]
    changed = shared.admin.patch("/admin/tenants/acme", json={"aliases": {"gpt-4o": "m"}, "weight": 3})
    assert changed.json()["changed"] == ["aliases", "weight"]
    shared.eventually(key, 200, model="gpt-4o")
    models = httpx2.get(shared.gateways[0].url + "/v1/models", headers={"authorization": f"Bearer {key}"}).json()
    assert {card["id"]: card["root"] for card in models["data"]} == {"m": "m", "gpt-4o": "m"}
    assert shared.admin.patch("/admin/tenants/acme", json={"weight": None}).json()["changed"] == ["aliases"]
    assert shared.admin.delete("/admin/overrides/acme").json()["changed"] == []
    shared.eventually(key, 404, model="gpt-4o")


def test_limits_are_set_and_read(shared: Site) -> None:
    key = shared.make_key()["key"]
    shared.eventually(key, 200)
    shared.admin.patch("/admin/tenants/acme", json={"limits": {"tokens_per_minute": 1}})
    shared.eventually(key, 429)
    [limit] = [one for one in shared.admin.get("/admin/limits").json()["limits"] if one["limit"] == "tokens_per_minute"]
    assert (limit["tenant"], limit["full"]) == ("acme", 1)
    shared.admin.delete("/admin/overrides/acme")
    shared.eventually(key, 200)


def test_a_tenant_comes_and_goes(shared: Site) -> None:
    made = shared.admin.post("/admin/tenants", json={"name": "team/new", "models": ["m"]})
    assert (made.status_code, made.json()["source"]) == (201, "operator")
    assert shared.admin.post("/admin/tenants", json={"name": "team/new"}).status_code == 409
    key = shared.make_key(tenant="team/new")["key"]
    shared.eventually(key, 200)
    assert shared.admin.delete("/admin/tenants/team/new").status_code == 204
    shared.eventually(key, 401)
    assert shared.admin.get("/admin/tenants/team/new").status_code == 404


def test_a_tenant_of_the_configuration_is_not_removed_here(shared: Site) -> None:
    refused = shared.admin.delete("/admin/tenants/acme")
    assert refused.status_code == 409
    assert "Take it out there" in refused.json()["error"]["remedy"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"models": ["nope"]}, "unknown model 'nope'"),
        ({"wieght": 2}, "Extra inputs are not permitted"),
        ({"weight": -1}, "more than 0"),
        ({"limits": {"tokens_per_minute": "planted-secret"}}, "valid integer"),
        ({"aliases": {"a": "outside"}}, "may not use"),
    ],
)
def test_a_change_that_does_not_fit_changes_nothing(shared: Site, change: dict[str, Any], says: str) -> None:
    before = shared.admin.get("/admin/tenants").json()
    refused = shared.admin.patch("/admin/tenants/acme", json=change)
    assert refused.status_code == 422
    assert says in refused.json()["error"]["message"]
    assert "planted-secret" not in refused.text
    assert shared.admin.get("/admin/tenants").json() == before


def test_replicas_are_taken_out_and_put_back(shared: Site) -> None:
    key = shared.make_key()["key"]
    shared.eventually(key, 200)
    assert shared.admin.put("/admin/drains/outside@0").json()["drained"] == ["outside@0"]
    shown = {row["replica"]: row["drained"] for row in shared.admin.get("/admin/replicas").json()["replicas"]}
    assert shown == {"m-0": False, "outside@0": True}
    assert shared.admin.delete("/admin/drains/outside@0").json()["drained"] == []
    assert shared.admin.put("/admin/drains/nope-7").status_code == 404


def test_a_reload_is_seen_by_every_gateway_and_a_wrong_file_by_none(shared: Site) -> None:
    plain = json.loads(shared.config_path.read_text(encoding="utf-8"))
    try:
        shared.config_path.write_text(json.dumps(plain | {"aliases": {"by-file": "m"}}), encoding="utf-8")
        key = shared.make_key()["key"]
        assert shared.admin.post("/admin/reload").json() == {"models": 2, "tenants": 1}
        shared.eventually(key, 200, model="by-file")
        shared.config_path.write_text(json.dumps(plain | {"aliases": {"by-file": "nowhere"}}), encoding="utf-8")
        refused = shared.admin.post("/admin/reload")
        assert refused.status_code == 422
        assert "nowhere" in refused.json()["error"]["message"]
        assert shared.ask(key, "by-file") == [200, 200]
    finally:
        shared.config_path.write_text(json.dumps(plain), encoding="utf-8")
        shared.admin.post("/admin/reload")


def test_everything_is_in_the_log_and_no_secret_is(shared: Site) -> None:
    made = shared.make_key(name="for the log")
    entries = shared.admin.get("/admin/audit", params={"last": 1}).json()["entries"]
    assert (entries[-1]["action"], entries[-1]["target"]) == ("key.create", made["id"])
    assert entries[-1]["actor"].startswith("admin:uid=")
    verdict = shared.admin.get("/admin/audit/verify").json()
    assert verdict["intact"]
    assert verdict["head"] == f"{entries[-1]['seq']}:{entries[-1]['mac']}"
    secret = made["key"].split("-", 3)[3]  # which may hold hyphens itself
    for file in shared.state.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


def test_large_and_measureless_bodies_are_refused(shared: Site) -> None:
    as_json = {"content-type": "application/json"}
    assert shared.admin.post("/admin/keys", content=b"x" * (2**20 + 1)).status_code == 413
    assert shared.admin.post("/admin/keys", content=iter([b"{", b"}"])).status_code == 411
    assert shared.admin.post("/admin/keys", content=b"{nonsense", headers=as_json).status_code == 400


# ---- over TCP, with a key


def test_tcp_asks_for_the_key_and_makes_one_if_there_is_none(tmp_path: Path) -> None:
    with site(tmp_path, admin_listen="127.0.0.1:0") as made:
        key = (tmp_path / "state" / "admin.key").read_text(encoding="utf-8").strip()
        assert (tmp_path / "state" / "admin.key").stat().st_mode & 0o077 == 0
        for wrong in (
            None,
            "Bearer",
            f"Basic {key}",
            "Bearer wrong",
            f"Bearer {key}x",
            f"Bearer {key[:-1]}",
            "Bearer \xff",
        ):
            headers = {} if wrong is None else {"authorization": wrong.encode("latin-1")}
            answer = made.admin.get("/admin/keys", headers=headers)
            assert answer.status_code == 401, wrong
            assert key not in answer.text
            assert answer.headers["www-authenticate"] == "Bearer"
        assert made.admin.get("/admin/keys", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_only_this_machine_is_listened_to() -> None:
    for address in ("0.0.0.0:1", "10.0.0.1:1", "[::]:1", "example.org:1", "127.0.0.1"):
        with pytest.raises(ValueError, match="admin_listen"):
            Config.model_validate({"version": "v1", "gateway": {"admin_listen": address}})


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    config = Config.model_validate(settings(tmp_path, admin_listen="none"))
    with running_gateway(config) as running:
        running.look()
        assert listener_of(running).serving is None
        assert not (tmp_path / "state" / "run").exists()


def test_a_key_that_is_not_there_leaves_tenants_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config.model_validate(settings(tmp_path, admin_key="${ENV:NOT_SET_ANYWHERE}"))
    with running_gateway(config) as running:
        wait_until(lambda: "the admin API cannot be served" in caplog.text, what="the reason is logged")
        assert listener_of(running).serving is None
        assert httpx2.get(running.url + "/healthz").status_code == 200


def test_a_socket_left_by_a_killed_gateway_is_taken_over(tmp_path: Path) -> None:
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(left))
    config = Config.model_validate(settings(tmp_path, admin_listen=f"unix:{left}"))
    with running_gateway(config) as running:
        wait_until(lambda: listener_of(running).serving, what="it serves")
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(left)), base_url="http://admin") as client:
            assert client.get("/admin/tenants").json()["tenants"][0]["name"] == "acme"
    assert not left.exists()


def test_the_next_gateway_takes_over(tmp_path: Path) -> None:
    config = Config.model_validate(settings(tmp_path))
    with running_gateway(config) as last:
        with running_gateway(config) as other:
            wait_until(lambda: listener_of(last).serving or listener_of(other).serving, what="one serves")
        wait_until(lambda: listener_of(last).serving, what="the one that is left serves")


def test_the_log_of_the_commands_and_of_the_api_is_one(shared: Site) -> None:
    config = Config.model_validate(settings(shared.config_path.parent))
    AuditLog.of(config).append(actor="cli:ann", action="key.revoke", target="x", now=1.0)
    assert shared.admin.get("/admin/audit", params={"last": 1}).json()["entries"][0]["actor"] == "cli:ann"
    assert shared.admin.get("/admin/audit/verify").json()["intact"]
