"""A burst of long prompts through a whole gateway: none is lost, and nothing of them stays. The same suite for every relay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from gateway.testing import RELAYS, wait_until
from tests.integration.gateway_harness import CHAT, Bench, bench, chat_body

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

TOKENS = 60_000
BURST = 32


@pytest.fixture(params=sorted(RELAYS), scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("state"), request.param) as made:
        made.fleet.start("m-0", "m", output_tokens=2, max_model_len=100_000)
        made.know()
        yield made


def test_a_burst_of_prompts_of_sixty_thousand_tokens_loses_none(served: Bench) -> None:
    """Twice as many as the replica takes at once: the others wait in the gateway, in their order."""
    said = chat_body(stream=False, messages=[{"role": "user", "content": "word " * TOKENS}], max_tokens=2)
    body, engine = json.dumps(said).encode(), served.fleet.engines["m-0"]
    before = engine.state.served
    with (
        httpx2.Client(timeout=200, limits=httpx2.Limits(max_connections=BURST)) as client,
        ThreadPoolExecutor(BURST) as pool,
    ):
        answers = list(pool.map(lambda _: client.post(served.url + CHAT, content=body), range(BURST)))
    assert [answer.status_code for answer in answers] == [200] * BURST, answers[0].text[:300]
    assert {answer.json()["usage"]["prompt_tokens"] for answer in answers} == {TOKENS}
    assert engine.state.served - before == BURST
    assert engine.state.most_running <= 16
    wait_until(lambda: served.gateway.idle, what="all counters are back at zero")
