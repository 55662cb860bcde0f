"""The pipelines' drawing: what `/status` says, told in blocks, lanes and words; and when it is asked."""

import itertools
import time

import pytest
from live_app import OpenPage
from playwright.sync_api import Locator, Page, Route, expect
from statuses import pipeline, status

pytestmark = pytest.mark.browser


def card(page: Page, number: int = 1) -> Locator:
    return page.get_by_role("region", name=f"Pipeline {number}")


def test_stages_are_drawn_with_their_figures(open_page: OpenPage) -> None:
    page = open_page(status=status(pipeline([0.006, 0.011, 0.0065])))
    expect(page.get_by_role("heading", level=1)).to_have_text("gptj-6b")
    expect(page.locator("#about")).to_have_text(
        "gptj_serve 0.1.0 · context 2,048 tokens · up 4\u202fh · 12 requests in progress"
    )
    expect(page.get_by_role("status").first).to_have_text("ready")
    first = card(page)
    expect(first).to_contain_text("212 tokens/s")
    assert first.locator(".counts").inner_text().split("\n") == [
        "running 14",
        "waiting 0",
        "microbatches in flight 3",
        "KV blocks 381 of 1,024",
    ]
    stages = first.locator(".stages > li")
    expect(stages).to_have_count(3)
    for text in (
        "Stage 1",
        "layers 9–17",
        "cuda:0 · float16 · 10.0.0.2",
        "6.7\u202fGiB in use",
        "4.0\u202fGiB of weights",
        "busy 100\u202f%",
        "0.9 of 2.3\u202fGiB",
    ):
        expect(stages.nth(1)).to_contain_text(text)
    expect(stages.nth(1)).to_contain_text("handed over in 340\u202fµs")
    expect(stages.nth(2)).to_contain_text("handed over in 2.9\u202fms")
    shares = stages.nth(0).locator(".bar").evaluate_all("bars => bars.map(b => parseFloat(b.firstChild.style.width))")
    assert shares == pytest.approx([100 * 6 / 11, 100 * 381 / 1024], abs=0.1)


def test_the_slowest_stage_is_named(open_page: OpenPage) -> None:
    page = open_page(status=status(pipeline([0.006, 0.011, 0.0065])))
    expect(card(page)).to_contain_text(
        "Stage 1 is the slowest: 13\u202fms for a microbatch, 1.8 times the others’ 7.3\u202fms."
    )
    assert [badge.is_visible() for badge in card(page).locator(".badge").all()] == [False, True, False]


def test_balanced_stages_are_called_so(open_page: OpenPage) -> None:
    page = open_page(status=status(pipeline([0.006, 0.0061])))
    expect(card(page)).to_contain_text("The stages are balanced: 7.1\u202fms to 7.2\u202fms for a microbatch.")
    expect(card(page).locator(".badge:visible")).to_have_count(0)


def test_bubbles_show_in_the_timeline(open_page: OpenPage) -> None:
    page = open_page(status=status(pipeline([0.006, 0.011, 0.0065])))
    lanes = card(page).locator(".lanes")
    expect(lanes).to_have_accessible_name(
        "Timeline of the last 810\u202fms until now. Computing: stage 0 53 %, stage 1 99 %, stage 2 60 %."
    )
    # the lane's part that is covered with rectangles says the same as the words
    covered = lanes.locator("svg").evaluate_all(
        """lanes => lanes.map(lane => [...lane.querySelectorAll("rect")]
            .reduce((sum, rect) => sum + parseFloat(rect.getAttribute("width")), 0))"""
    )
    assert covered == pytest.approx([53, 99, 60], abs=1.5)
    colours_by_title = """lane => Object.fromEntries([...lane.querySelectorAll("rect")]
        .map(rect => [rect.textContent.split(":")[0], rect.getAttribute("class")]))"""
    first, second = (lanes.locator("svg").nth(index).evaluate(colours_by_title) for index in (0, 1))
    common = first.keys() & second.keys()
    assert len(common) > 20
    assert all(first[name] == second[name] for name in common), "a microbatch has one colour in all lanes"


def test_a_pipeline_that_starts_again(open_page: OpenPage) -> None:
    healthy, broken = pipeline([0.006, 0.006]), pipeline([0.006, 0.006], "m3q8w1zt", is_ready=False)
    page = open_page(status=status(healthy, broken, problems=["pipeline k1 did not answer in 2 s"]))
    expect(page.get_by_role("status").first).to_have_text("1 of 3 pipelines ready")
    expect(page.locator("#problems")).to_have_text("pipeline k1 did not answer in 2 s")
    expect(card(page, 1)).to_contain_text("ready")
    for text in (
        "m3q8w1zt",
        "stages are starting again",
        "restarted 1×",
        "waiting 9",
        "recoveries 1",
        "6.2\u202fs ago",
    ):
        expect(card(page, 2)).to_contain_text(text)


def test_what_is_not_told_is_not_drawn(open_page: OpenPage) -> None:
    engine = {"num_running": 2, "num_kv_blocks": 10, "num_kv_blocks_used": 3, "num_tokens_generated": 5}
    page = open_page(status={"model": "old", "tasks": ["classify"], "pipelines": [{"engine": engine}]})
    expect(card(page)).to_contain_text("running 2")
    expect(card(page)).to_contain_text("KV blocks 3 of 10")
    expect(card(page).locator(".stages, .lanes")).to_have_count(0)
    bare = {"stage_index": 0, "layers": [0, 1], "device": "cpu"}
    page = open_page(status={"pipelines": [{"engine": {}, "stages": [bare, bare | {"layers": [1, 3]}]}]})
    expect(card(page).locator(".stages > li").first).to_contain_text("layer 0")
    expect(card(page)).to_contain_text("No recent work to compare the stages by.")


def test_only_tasks_of_the_service_can_be_chosen(open_page: OpenPage) -> None:
    page = open_page(status={"tasks": ["classify"], "pipelines": []})
    expect(page.get_by_role("tab", name="Classify")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tab", name="Generate")).to_be_disabled()
    page.get_by_role("tab", name="Generate").click(force=True)
    expect(page.get_by_role("tabpanel", name="Classify")).to_be_visible()


def test_it_is_drawn_in_place(open_page: OpenPage) -> None:
    """Who reads or scrolls in a card keeps their place when the next status comes."""
    page = open_page(status=status(pipeline([0.006] * 7)))
    stages = page.get_by_role("group", name="Stages of pipeline 1")
    stages.focus()
    page.keyboard.press("ArrowRight")
    deadline = time.monotonic() + 30
    # asked from here, as the page's own policy forbids the polling of wait_for_function, which evaluates strings
    while not (left := stages.evaluate("box => box.scrollLeft")) and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert left > 0
    for _ in range(2):
        page.wait_for_event("requestfinished")
    expect(stages).to_be_focused()
    assert stages.evaluate("box => box.scrollLeft") >= left


def test_failures_slow_the_asking_down(open_page: OpenPage) -> None:
    asked_at: list[float] = []

    def refuse(route: Route) -> None:
        asked_at.append(time.monotonic())
        route.fulfill(status=500, json={"error": "internal error", "error_type": "internal"})

    page = open_page(prepare=lambda page: page.route("**/status", refuse))
    expect(page.get_by_role("status").first).to_have_text("status unknown, trying again")
    deadline = time.monotonic() + 30
    while len(asked_at) < 3 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(asked_at)]
    assert gaps_s[0] >= 1.9
    assert gaps_s[1] >= 3.9
    page.unroute("**/status")
    page.reload()
    expect(page.get_by_role("status").first).to_have_text("ready")


def test_a_hidden_tab_asks_nothing(open_page: OpenPage) -> None:
    page = open_page(status=status(pipeline([0.006])))
    hide = """isHidden => {
        Object.defineProperty(document, "hidden", {value: isHidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.wait_for_timeout(500)
    page.evaluate(hide, True)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_timeout(2500)
    assert requests == []
    with page.expect_request("**/status"):
        page.evaluate(hide, False)


def test_the_live_service_draws_its_stages(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#generate-max_new_tokens").fill("150")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(card(page).locator(".counts")).to_contain_text("running 1")
    expect(card(page).locator(".lanes svg rect").nth(30)).to_be_attached()
    expect(card(page)).to_contain_text("layers 0–3")


@pytest.mark.parametrize(
    ("num_starting", "state", "words"),
    [
        (0, "asleep: the next request starts a pipeline", "No pipeline runs: the next request starts one."),
        (1, "starting", "1 pipeline starting …"),
    ],
)
def test_a_service_that_sleeps_says_so(open_page: OpenPage, num_starting: int, state: str, words: str) -> None:
    changes = {"num_starting": num_starting, "num_stopping": 0}
    page = open_page(status=status(scaling={"min_pipelines": 0, "max_pipelines": 3, "changes": changes}))
    expect(page.get_by_role("status").first).to_have_text(state)
    expect(page.locator("#pipelines")).to_have_text(words)
