"""A burst of long prompts through a whole gateway: none is lost, and nothing of them stays. The same suite for every relay."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.testing import RELAYS, wait_until
from tests.integration.gateway_harness import Bench, bench, chat_body

pytestmark = pytest.mark.integration

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
    body = chat_body(stream=False, messages=[{"role": "user", "content": "word " * TOKENS}], max_tokens=2)
    engine = served.fleet.engines["m-0"]
    before = engine.state.served
    with ThreadPoolExecutor(BURST) as pool:
        answers = list(pool.map(lambda _: served.ask(body), range(BURST)))
    assert [answer.status_code for answer in answers] == [200] * BURST, answers[0].text[:300]
    assert {answer.json()["usage"]["prompt_tokens"] for answer in answers} == {TOKENS}
    assert engine.state.served - before == BURST
    assert engine.state.most_running <= 16
    wait_until(lambda: served.gateway.idle, what="all counters are back at zero")
