"""The console in headless Chromium: it signs in, shows what happens as it happens, streams an answer, and can be used by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gateway.config import Config
from gateway.keys import Keystore
from gateway.testing import FakeFleet, RunningGateway, fake_fleet, running_gateway, wait_until
from placement.table import ReplicaState
from tests.integration.browsing import FAINT_TEXTS, chromium, sized

pytestmark = [pytest.mark.timeout(180), pytest.mark.browser]

ADMIN_KEY = "sk-sliceway-admin-for-the-console-tests"
PATIENCE_SECONDS = 30

UNNAMED_CONTROLS = """
return [...document.querySelectorAll("input, select, textarea, button")].filter((e) => e.checkVisibility())
  .filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.getAttribute("aria-label")).map((e) => e.id);
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeFleet]:
    with fake_fleet(tmp_path_factory.mktemp("state")) as one:
        yield one


@pytest.fixture(scope="module")
def gateway(fleet: FakeFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    secret = tmp_path_factory.mktemp("secret") / "admin"
    secret.write_text(ADMIN_KEY, encoding="utf-8")
    config = Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(fleet.state.root),
            "models": [{"name": "chat", "source": "org/chat"}],
            "tenants": [
                {"name": "acme", "models": ["chat"]},
                {"name": "held", "models": ["chat"], "limits": {"requests_per_minute": 4}},
            ],
            "gateway": {"listen": "127.0.0.1:0", "admin_key": f"file:{secret}", "admin_listen": "none"},
        }
    )
    fleet.start("chat-0", "chat", output_tokens=12, itl_seconds=0.01)
    with running_gateway(config) as one:
        yield one


@pytest.fixture(scope="module")
def keys(gateway: RunningGateway, fleet: FakeFleet) -> dict[str, str]:
    store = Keystore(fleet.state.root)
    made = {tenant: store.create(tenant, now=0.0)[0] for tenant in ("acme", "held")}
    gateway.look()
    wait_until(lambda: len(gateway.gateway.exchanges.keyring().records) == 2, what="the gateway knows the keys")
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture
def page(browser: WebDriver, gateway: RunningGateway) -> WebDriver:
    browser.get(gateway.url + "/healthz")
    browser.execute_script("sessionStorage.clear()")
    browser.get_log("browser")
    browser.set_window_size(1280, 900)
    browser.get(gateway.url + "/console")
    return browser


def find(page: WebDriver, name: str) -> Any:
    return page.find_element(By.ID, name)


def until(page: WebDriver, condition: Any, what: str) -> Any:
    return WebDriverWait(page, PATIENCE_SECONDS, poll_frequency=0.05).until(lambda _: condition(), what)


def sign_in(page: WebDriver, key: str = ADMIN_KEY) -> None:
    until(page, lambda: find(page, "admin-key").is_displayed(), "the sign-in form")
    find(page, "admin-key").send_keys(key, Keys.ENTER)


def signed_in(page: WebDriver) -> None:
    sign_in(page)
    until(page, lambda: find(page, "board").is_displayed(), "the board")


def test_a_wrong_key_shows_nothing_and_says_so(page: WebDriver) -> None:
    sign_in(page, "sk-wrong")
    until(page, lambda: "not the admin key" in find(page, "sign-in-error").text, "the refusal")
    assert not find(page, "board").is_displayed()


def test_it_shows_the_fleet_and_changes_with_it(page: WebDriver, fleet: FakeFleet, gateway: RunningGateway) -> None:
    signed_in(page)
    assert "serving" in find(page, "health").text
    assert "chat: ready" in find(page, "fleet").text
    fleet.mark("chat-0", ReplicaState.FAILED, "out of <b>memory</b>")
    gateway.look()
    until(page, lambda: "failed: out of <b>memory</b>" in find(page, "slices").text, "the failure, as text")
    fleet.mark("chat-0", ReplicaState.READY)
    gateway.look()
    until(page, lambda: "chat: ready" in find(page, "fleet").text, "the recovery")
    assert page.get_log("browser") == []


def test_the_playground_streams_an_answer_and_the_figures_follow(page: WebDriver, keys: dict[str, str]) -> None:
    signed_in(page)
    until(page, lambda: find(page, "model").text.strip() == "chat", "the models to choose from")
    find(page, "tenant-key").send_keys(keys["acme"])
    find(page, "send").click()
    until(page, lambda: "first token after" in find(page, "play-note").text, "the end of the answer")
    assert find(page, "answer").text.startswith("the quick brown")
    until(page, lambda: "acme" in find(page, "slices").text, "the tenant's line")
    until(page, lambda: "for acme" in find(page, "fleet").text, "the tenant in the drawing")


def test_it_says_who_is_held_back_and_by_what(page: WebDriver, gateway: RunningGateway, keys: dict[str, str]) -> None:
    body = {"model": "chat", "max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}
    asked = [
        httpx2.post(
            f"{gateway.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {keys['held']}"}
        )
        for _ in range(6)
    ]
    assert 429 in {answer.status_code for answer in asked}
    signed_in(page)
    until(page, lambda: "held: 4 of 4 requests per minute: refusing for" in find(page, "limits").text, "the limit")


def test_the_queue_of_every_slice_is_counted(page: WebDriver) -> None:
    signed_in(page)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#slices tbody tr:not(.tenant)"), "the slices")
    cells = page.find_elements(By.CSS_SELECTOR, "#slices tbody tr:not(.tenant) td:nth-child(4)")
    assert [cell.text for cell in cells] == ["0"]


MIG_SLICE = "GPU-5c5f4b7e-0d4a-4bbd-9a06-2d0c7b6f1e11/1g.10gb@3"
OUT_OF_SIGHT = """
const frame = document.querySelector(".scroll").getBoundingClientRect();
return [...document.querySelectorAll("#slices tbody td")].filter((e) => e.textContent)
  .filter((e) => { const at = e.getBoundingClientRect(); return at.left < frame.left - 1 || at.right > Math.min(frame.right, innerWidth) + 1; })
  .map((e) => `${e.dataset.label}: ${e.textContent}`);
"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_figure_of_a_slice_is_in_sight_however_long_its_id_is(
    page: WebDriver, fleet: FakeFleet, gateway: RunningGateway, width: int
) -> None:
    kept = fleet.rows["chat-0"]
    fleet.rows["chat-0"] = kept.model_copy(update={"slice": kept.slice.model_copy(update={"id": MIG_SLICE})})
    fleet.publish()
    gateway.look()
    try:
        sized(page, width)
        signed_in(page)
        named = f"#slices [title='{MIG_SLICE}']"
        until(page, lambda: page.find_elements(By.CSS_SELECTOR, named), "the slice, with its whole id at hand")
        assert page.find_element(By.CSS_SELECTOR, named).text == "GPU-5c5f\u20261e11/1g.10gb@3"
        assert MIG_SLICE.partition("/")[0] in find(page, "fleet").text
        labels = page.execute_script("return [...document.querySelectorAll('#slices td')].map((e) => e.dataset.label)")
        assert "E2E p50 / p99" in labels
        assert page.execute_script(OUT_OF_SIGHT) == []
    finally:
        fleet.rows["chat-0"] = kept
        fleet.publish()
        gateway.look()


@pytest.mark.parametrize(
    ("slice_id", "kind", "share", "from_the_left"),
    [
        ("GPU-5c5f4b7e-0d4a-4bbd-9a06-2d0c7b6f1e11/1g.24gb@9", "mig", 0.25, 0.75),
        ("GPU-5c5f4b7e-0d4a-4bbd-9a06-2d0c7b6f1e11/3g.40gb@4", "mig", 0.5, 0.5),
        ("GPU-0b1c2d3e-0d4a-4bbd-9a06-2d0c7b6f1e11", "gpu", 1.0, 0.0),
    ],
)
def test_a_slice_is_drawn_as_large_as_its_part_of_the_card(
    page: WebDriver,
    fleet: FakeFleet,
    gateway: RunningGateway,
    slice_id: str,
    kind: str,
    share: float,
    from_the_left: float,
) -> None:
    kept = fleet.rows["chat-0"]
    profile = slice_id.partition("/")[2].partition("@")[0] or None
    update = {"id": slice_id, "kind": kind, "profile": profile, "gpu": slice_id.partition("/")[0]}
    fleet.rows["chat-0"] = kept.model_copy(update={"slice": kept.slice.model_copy(update=update)})
    fleet.publish()
    gateway.look()
    try:
        signed_in(page)
        drawn = f".slice[title^='{slice_id}']"
        until(page, lambda: page.find_elements(By.CSS_SELECTOR, drawn), "the slice")
        left, width, whole = page.execute_script(
            "const one = document.querySelector(arguments[0]), at = one.getBoundingClientRect(), card = one.parentElement.getBoundingClientRect();"
            "return [at.left - card.left, at.width, card.width];",
            drawn,
        )
        assert width / whole == pytest.approx(share, abs=0.02)
        assert left / whole == pytest.approx(from_the_left, abs=0.02)
    finally:
        fleet.rows["chat-0"] = kept
        fleet.publish()
        gateway.look()


def test_it_says_what_is_planned_or_that_nobody_plans(page: WebDriver) -> None:
    signed_in(page)
    until(page, lambda: "No controller runs here" in find(page, "plan").text, "the plan")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_at_every_width_and_in_either_scheme(page: WebDriver, width: int, scheme: str) -> None:
    sized(page, width, scheme)
    assert page.execute_script(FAINT_TEXTS) == []
    signed_in(page)
    assert page.execute_script(FAINT_TEXTS) == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_it_works_without_a_mouse(page: WebDriver) -> None:
    signed_in(page)
    assert page.execute_script(UNNAMED_CONTROLS) == []
    reached = set()
    for _ in range(12):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.switch_to.active_element.get_attribute("id"))
    assert {"sign-out", "tenant-key", "model", "prompt", "send"} <= reached
    assert find(page, "board").find_elements(By.CSS_SELECTOR, "[role=status]")


def test_signing_out_forgets_the_key(page: WebDriver) -> None:
    signed_in(page)
    find(page, "sign-out").click()
    until(page, lambda: find(page, "admin-key").is_displayed(), "the sign-in form")
    assert page.execute_script("return sessionStorage.length") == 0


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_given_without_the_key(gateway: RunningGateway) -> None:
    shown = httpx2.get(gateway.url + "/console")
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    for name in ("console.html", "console.css", "console.js"):
        text = httpx2.get(f"{gateway.url}/console/{name}").text
        assert "http://" not in text
        assert "https://" not in text
    assert httpx2.get(gateway.url + "/console/state").status_code == 401
    assert httpx2.get(gateway.url + "/console/..%2fapp.py").status_code == 404
    static = Path(__file__).parents[2] / "gateway" / "console" / "static"
    assert {path.name for path in static.iterdir()} == {"console.html", "console.css", "console.js"}
