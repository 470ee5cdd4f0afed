"""What an answer says of the gateway's own time. The same suite for every relay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.testing import RELAYS
from tests.integration.gateway_harness import Bench, bench, chat_body

pytestmark = pytest.mark.integration

HEADER = "x-sliceway-overhead-ms"


@pytest.fixture(params=sorted(RELAYS), scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param) as made:
        made.fleet.start("m-0", "m", output_tokens=2)
        made.know()
        yield made


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_tells_what_the_gateway_took_where_it_is_asked(served: Bench, stream: bool) -> None:
    answer = served.ask(chat_body(stream=stream), headers={"x-sliceway-overhead": "1"})
    assert answer.status_code == 200
    assert float(answer.headers[HEADER]) >= 0


def test_nobody_is_told_who_does_not_ask(served: Bench) -> None:
    assert HEADER not in served.ask(chat_body(stream=False)).headers


@pytest.mark.parametrize("relay", RELAYS)
def test_the_configuration_can_ask_for_all(relay: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with bench(tmp_path_factory.mktemp("state"), relay, overhead_header=True) as made:
        made.fleet.start("m-0", "m", output_tokens=2)
        made.know()
        assert float(made.ask(chat_body(stream=False)).headers[HEADER]) >= 0
