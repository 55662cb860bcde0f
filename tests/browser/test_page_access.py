"""The page for everyone: by keyboard, on a phone, in the dark, through a screen reader. And its pictures."""

import os
import re
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from live_app import OpenPage
from playwright.sync_api import Locator, Page, expect
from statuses import pipeline, status

pytestmark = pytest.mark.browser

IMAGES = Path(__file__).parents[2] / "docs/images"
MAX_IMAGE_BYTES = 200_000
TASKS = {"generate": "Generate", "classify": "Classify", "qa": "Answer"}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def answer(page: Page, task: str) -> None:
    page.locator(f"#{task}").get_by_role("button", name=TASKS[task], exact=True).click()
    expect(page.locator(f"#panel-{task} .result")).to_be_visible()
    expect(page.locator(f"#{task} [data-stop]")).to_be_disabled()


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("task", TASKS)
def test_axe_finds_nothing_serious(open_page: OpenPage, task: str, scheme: Literal["light", "dark"]) -> None:
    pipelines = pipeline([0.006, 0.011, 0.0065]), pipeline([0.006, 0.006], "m3q8w1zt", is_ready=False)
    page = open_page(f"#{task}", color_scheme=scheme, status=status(*pipelines, problems=["pipeline k1 is silent"]))
    expect(page.get_by_role("region", name="Pipeline 2")).to_be_visible()
    assert violations(page) == []
    answer(page, task)
    for summary in page.locator(f"#panel-{task} summary").all():
        summary.click()
    if task == "generate":
        page.locator("#answers .token").nth(2).hover()
        expect(page.get_by_role("tooltip")).to_be_visible()
    assert violations(page) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_serious_in_errors_and_the_dialog(
    open_page: OpenPage, scheme: Literal["light", "dark"]
) -> None:
    page = open_page(color_scheme=scheme)
    page.locator("#generate-top_p").fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#generate-top_p")).to_have_attribute("aria-invalid", "true")
    assert violations(page) == []
    page.get_by_role("button", name="Key", exact=True).click()
    assert violations(page) == []


def test_landmarks_and_headings(open_page: OpenPage) -> None:
    page = open_page()
    for role in ("banner", "main", "complementary"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_text("gptj-demo")
    expect(page).to_have_title("gptj-demo: gptj_serve")


@pytest.mark.parametrize("task", TASKS)
def test_a_phone_needs_no_scrolling_sideways(open_page: OpenPage, task: str) -> None:
    pipelines = pipeline([0.006, 0.011, 0.0065, 0.006, 0.006, 0.006, 0.006]), pipeline([0.006], is_ready=False)
    page = open_page(f"#{task}", width=360, height=740, status=status(*pipelines))
    answer(page, task)
    for summary in page.locator(f"#panel-{task} summary").all():
        summary.click()
    if task == "generate":
        page.locator("#answers .token").nth(4).click()
        tip = page.get_by_role("tooltip").bounding_box()
        assert tip is not None
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    main, aside = page.get_by_role("main").bounding_box(), page.get_by_role("complementary").bounding_box()
    assert main is not None
    assert aside is not None
    assert aside["y"] >= main["y"] + main["height"], "the pipelines are not below the tasks"


def test_dark_and_light(open_page: OpenPage) -> None:
    def lightness(page: Page, part: str) -> float:
        colour = page.locator("body").evaluate("(body, part) => getComputedStyle(body)[part]", part)
        return sum(map(int, re.findall(r"\d+", colour))) / (3 * 255)

    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert lightness(light, "backgroundColor") > 0.9
    assert lightness(light, "color") < 0.2
    assert lightness(dark, "backgroundColor") < 0.1
    assert lightness(dark, "color") > 0.8


class Keyboard:
    """Does with a page only what keys do."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def tab_to(self, target: Locator) -> None:
        for _ in range(60):
            if target.evaluate("target => target === document.activeElement"):
                outline = target.evaluate("target => getComputedStyle(target).outlineStyle")
                assert outline != "none", "the focus can't be seen"
                return
            self._page.keyboard.press("Tab")
        raise AssertionError(f"no way to {target} by the Tab key")

    def press(self, *keys: str) -> None:
        for key in keys:
            self._page.keyboard.press(key)

    def write(self, text: str) -> None:
        self.press("Control+a")
        self._page.keyboard.type(text)


def test_generate_by_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    keyboard = Keyboard(page)
    keyboard.tab_to(page.get_by_role("link", name="Skip to the tasks"))
    keyboard.press("Enter")
    keyboard.tab_to(page.get_by_role("tab", name="Generate"))
    keyboard.tab_to(page.get_by_label("Prompt", exact=True))
    keyboard.write("The captain")
    keyboard.tab_to(page.get_by_label("max_new_tokens", exact=True))
    keyboard.write("4")
    keyboard.tab_to(page.locator("#generate summary"))
    keyboard.press("Enter")
    keyboard.tab_to(page.get_by_label("ignore_eos"))
    keyboard.press("Space")
    keyboard.tab_to(page.get_by_role("button", name="Generate", exact=True))
    keyboard.press("Enter")
    expect(page.locator("#answers .token")).to_have_count(4)
    expect(page.locator("#panel-generate [role=status]")).to_contain_text("Finished")
    keyboard.tab_to(page.locator("#answers .text"))
    keyboard.press("ArrowRight", "ArrowRight")
    expect(page.get_by_role("tooltip")).to_be_visible()
    keyboard.tab_to(page.get_by_label("Tint by probability"))
    expect(page.get_by_role("tooltip")).to_be_hidden()
    keyboard.press("Space")
    expect(page.locator("#answers")).not_to_have_class(re.compile("tinted"))


def test_classify_by_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    keyboard = Keyboard(page)
    keyboard.tab_to(page.get_by_role("tab", name="Generate"))
    keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Classify")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Classify")).to_be_visible()
    keyboard.tab_to(page.get_by_label("Text", exact=True))
    keyboard.write("book me a table for two")
    keyboard.press("Control+Enter")
    expect(page.locator("#texts li").first).to_contain_text("restaurant_reservation")
    keyboard.tab_to(page.get_by_role("radio", name="A trained head"))
    keyboard.press("ArrowDown")
    keyboard.tab_to(page.get_by_label("candidate_labels"))
    keyboard.write("food\nmoney")
    keyboard.press("Control+Enter")
    expect(page.locator("#texts li")).to_have_count(2)


def test_answer_by_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    keyboard = Keyboard(page)
    keyboard.tab_to(page.get_by_role("tab", name="Generate"))
    keyboard.press("End")
    keyboard.tab_to(page.get_by_label("Question", exact=True))
    keyboard.write("Where does Anna work?")
    keyboard.tab_to(page.get_by_role("button", name="Answer"))
    keyboard.press("Enter")
    expect(page.locator("#panel-qa [role=status]")).to_contain_text("%")
    first = page.locator("#context mark").text_content()
    keyboard.tab_to(page.get_by_role("radio").first)
    keyboard.press("ArrowDown")
    expect(page.get_by_role("radio").nth(1)).to_be_checked()
    expect(page.locator("#context mark")).not_to_have_text(first or "")


@pytest.mark.skipif(not os.environ.get("UPDATE_SCREENSHOTS"), reason="writes docs/images: needs UPDATE_SCREENSHOTS=1")
def test_pictures_for_the_docs(open_page: OpenPage) -> None:
    def save(page: Page, name: str) -> None:
        IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=IMAGES / name)
        assert (IMAGES / name).stat().st_size < MAX_IMAGE_BYTES

    def generate(page: Page) -> None:
        page.locator("#generate-max_new_tokens").fill("90")
        page.locator("#generate-temperature").fill("0.7")
        page.locator("#generate-seed").fill("3")
        answer(page, "generate")
        expect(page.locator(".lanes svg rect").nth(40)).to_be_attached()

    page = open_page(height=860)
    generate(page)
    page.locator("#answers .token").nth(14).hover()
    save(page, "page-generate.png")
    page = open_page("#qa", height=860)
    answer(page, "qa")
    expect(page.locator(".lanes svg rect").nth(1)).to_be_attached()
    save(page, "page-qa.png")
    page = open_page("#classify", height=860, color_scheme="dark")
    answer(page, "classify")
    save(page, "page-classify-dark.png")
    page = open_page(width=390, height=844, color_scheme="dark")
    generate(page)
    page.locator("#panel-generate [data-figures]").evaluate("figures => scrollTo(0, figures.offsetTop - 380)")
    save(page, "page-dark-phone.png")
