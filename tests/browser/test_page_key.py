"""The page before a service that asks for keys: it asks for one in turn, and keeps it where it was told to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from live_app import LiveApp, OpenPage
from playwright.sync_api import Page, Route, expect

from gptj_serve.config import IngressConfig

pytestmark = pytest.mark.browser

KEY = "sk-right-secret"
REFUSAL = {"error": "Authorization: needs an API key", "error_type": "unauthorized"}


def locked(*paths: str) -> Callable[[Page], None]:
    """All but the page itself, or only some paths, answer 401 without the key."""

    def check(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            route.fulfill(status=401, json=REFUSAL, headers={"WWW-Authenticate": "Bearer"})

    def prepare(page: Page) -> None:
        for path in paths or ("status", "generate", "classify", "qa"):
            page.route(f"**/{path}", check)

    return prepare


def test_a_key_is_asked_for_and_used(open_page: OpenPage) -> None:
    page = open_page(prepare=locked())
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("This service answers only with a key.")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    expect(dialog.get_by_label("Key", exact=True)).to_have_attribute("type", "password")
    dialog.get_by_label("Key", exact=True).fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The service does not take this key.")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready")
    page.locator("#generate-max_new_tokens").fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#answers .token")).to_have_count(3)
    page.reload()  # it is this tab's
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [[KEY], []]


def test_a_service_with_keys(open_page: OpenPage, tmp_path: Path) -> None:
    """A real one; above, the answers are made up."""
    (tmp_path / "keys.yaml").write_text(f"keys: [{{name: web, key: {KEY}}}]\n")
    with LiveApp(IngressConfig(api_keys_file=str(tmp_path / "keys.yaml"))) as app:
        page = open_page(app=app)
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key", exact=True).fill("sk-wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The service does not take this key.")
        dialog.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("ready")
        page.locator("#generate-max_new_tokens").fill("3")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.locator("#answers .token")).to_have_count(3)


def test_a_key_can_be_remembered_and_forgotten(open_page: OpenPage) -> None:
    page = open_page(prepare=locked())
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    dialog.get_by_label("Remember in this browser").check()
    dialog.get_by_role("button", name="Use key").click()
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [[], [KEY]]
    other = page.context.new_page()
    locked()(other)
    other.goto(page.url)
    expect(other.locator("#state")).to_have_text("ready")
    page.get_by_role("button", name="Key", exact=True).click()
    expect(dialog).to_contain_text("A key is set and remembered")
    dialog.get_by_role("button", name="Forget key").click()
    assert page.evaluate("Object.values(localStorage)") == []
    expect(dialog).to_contain_text("This service answers only with a key.")


def test_without_a_key_nothing_is_asked_again(open_page: OpenPage) -> None:
    page = open_page(prepare=locked())
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_have_text("needs a key")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_timeout(2500)
    assert requests == []
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#panel-generate [role=alert]")).to_have_text("The service answers only with a key.")
    page.get_by_role("button", name="Key", exact=True).click()
    page.get_by_label("Key", exact=True).last.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")


def test_an_open_status_and_locked_tasks(open_page: OpenPage) -> None:
    page = open_page(prepare=locked("generate"))
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.locator("#generate-max_new_tokens").fill("2")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("dialog").get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#answers .token")).to_have_count(2)
