"""A Chromium that looks at a live service, and that tells of everything that goes wrong in a page."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from live_app import LiveApp, OpenPage
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of [45]\d\d")
"""What Chromium writes of each answer that is an error; tests of such answers look at what the page makes of them."""


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium or Chrome; without one tests are skipped, or fail if `REQUIRE_BROWSER` is set."""
    for name in CHROMIUM_NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    reason = f"needs a browser: none of {', '.join(CHROMIUM_NAMES)} is in the PATH"
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def live(chromium: str, one_torch_thread: None) -> Iterator[LiveApp]:
    with LiveApp() as app:
        yield app


@pytest.fixture(scope="module")  # while Playwright runs, its event loop stands in the way of asynchronous tests
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, live: LiveApp) -> Iterator[OpenPage]:
    """`open_page(width=…, color_scheme=…, status=…)` → the service's page, with `status` for what `/status` answers.

    `app` is another service than the usual one.

    In the end no page may have written an error to the console, or asked anyone but the service for anything.
    """
    complaints: list[str] = []
    contexts = []

    def open_(
        path: str = "",
        *,
        app: LiveApp = live,
        width: int = 1280,
        height: int = 900,
        color_scheme: Literal["light", "dark"] = "light",
        status: Any = None,
        prepare: Callable[[Page], None] = lambda page: None,
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=color_scheme,
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if is_elsewhere(request.url, app) else None)
        if status is not None:
            page.route("**/status", lambda route: route.fulfill(json=status))
        prepare(page)
        page.goto(app.url + path)
        return page

    def is_elsewhere(url: str, app: LiveApp) -> bool:
        return not url.startswith((app.url, "data:"))

    yield open_
    for context in contexts:
        context.close()
    assert [complaint for complaint in complaints if not REFUSED.match(complaint)] == []
