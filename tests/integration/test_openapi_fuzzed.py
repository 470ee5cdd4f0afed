"""Requests made by schemathesis from our own OpenAPI documents, sent to running gateways: no 500, and every answer as described.

The same requests every time. `SLICEWAY_FUZZ_EXAMPLES=500 pytest tests/integration/test_openapi_fuzzed.py` makes more of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import RELAYS, fake_fleet, running_gateway, wait_until
from gateway.wiring import wall_clock
from tests.integration.test_admin_api import listener_of

pytestmark = pytest.mark.integration

# `ignored_auth` leaves the header in that it means to take out; a request without a key is sent below. Good data may be refused:
# that an alias leads to a model that exists, or that two fields go together, no OpenAPI document can say.
NOT_ASKED = [ignored_auth, positive_data_acceptance]
EXAMPLES = int(os.environ.get("SLICEWAY_FUZZ_EXAMPLES", "5"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(params=sorted(RELAYS), scope="module")
def public(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    state = tmp_path_factory.mktemp("state")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": name, "source": "x"} for name in ("m", "e")],
            "tenants": [{"name": "acme"}],
            "gateway": {"listen": "127.0.0.1:0", "admin_listen": "none"},
        }
    )
    key, _ = Keystore(state).create("acme", now=wall_clock())
    with fake_fleet(state) as fleet, running_gateway(config, relay=request.param) as running:
        fleet.start("m-0", "m", ttft_seconds=0.0, itl_seconds=0.0)
        fleet.start("e-0", "e", task="embed")
        running.look()
        schema = schemathesis.openapi.from_dict(httpx2.get(f"{running.url}/openapi.json", timeout=60).json())
        schema.config.update(base_url=running.url)
        yield schema, key
        wait_until(lambda: running.idle, what="all counters are back at zero")


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    state = tmp_path_factory.mktemp("state")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x"}],
            "tenants": [{"name": "acme"}],
            "gateway": {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"},
        }
    )
    with running_gateway(config) as running:
        address = wait_until(lambda: listener_of(running).serving, what="the admin API is served")
        key = (state / "admin.key").read_text(encoding="utf-8").strip()
        schema = schemathesis.openapi.from_dict(httpx2.get(f"http://{address}/openapi.json", timeout=60).json())
        schema.config.update(base_url=f"http://{address}")
        yield schema, key


def ask(schema: Any, key: str) -> None:
    """Every operation, a few times; schemathesis says which request it was that went wrong."""
    operations = [result.ok() for result in schema.get_all_operations()]
    assert operations
    for operation in operations:

        @bounded
        @given(case=operation.as_strategy())
        def send(case: schemathesis.Case) -> None:
            headers = {"authorization": f"Bearer {key}"}
            case.call_and_validate(timeout=30, headers=headers, excluded_checks=NOT_ASKED)
            if case.path.startswith("/admin"):
                assert case.call(timeout=30).status_code == 401

        send()


def test_the_public_document_is_true(public: Any) -> None:
    ask(*public)


def test_the_admin_document_is_true(admin: Any) -> None:
    ask(*admin)
