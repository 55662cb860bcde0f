"""Generation in the page: a text that grows token by token, what else could have been, errors at their fields."""

import json
import re
import shlex
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from live_app import LiveApp, OpenPage
from playwright.sync_api import Locator, Page, Request, Route, expect

from gptj_serve.api.huggingface_schemas import ClassifyParameters, GenerateParameters, QAParameters
from gptj_serve.config import IngressConfig

pytestmark = pytest.mark.browser

RECORD_COUNTS = """() => {
    window.counts = [];
    const answers = document.querySelector("#answers");
    new MutationObserver(() => counts.push(answers.querySelectorAll(".token").length))
        .observe(answers, {childList: true, subtree: true});
}"""

REMEMBER_KEY = "sessionStorage.setItem('gptj_serve key /', %s)"


def tokens(page: Page) -> Locator:
    return page.locator("#answers .token")


def fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        page.locator(f"#generate [name='{name}']").fill(str(value))


def start(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()


def generate(page: Page, **fields: object) -> None:
    """Until the answer is whole: the new one, which takes the place of the last a moment after the click."""
    fill(page, **fields)
    page.locator("#answers .text").evaluate_all("texts => texts.forEach(text => { text.dataset.old = ''; })")
    start(page)
    expect(page.locator("#answers .text:not([data-old])").last).to_have_attribute("aria-busy", "false")


def body_of(request: Request) -> dict:
    return json.loads(request.post_data or "")


def test_a_text_comes_token_by_token(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    page.evaluate(RECORD_COUNTS)
    generate(page, inputs="The ship", max_new_tokens=60, temperature=0)
    counts = page.evaluate("counts")
    assert counts == sorted(counts)
    assert len(set(counts)) > 5, "the text came in lumps"
    expected = live.post("generate", {"inputs": "The ship", "parameters": {"max_new_tokens": 60}})["generated_text"]
    assert "".join(tokens(page).all_text_contents()) == expected
    expect(page.locator("#panel-generate [data-figures]")).to_contain_text("60 tokens")
    expect(page.locator("#panel-generate [data-figures]")).to_contain_text(re.compile(r"[\d.]+ tokens/s"))
    expect(page.locator("#panel-generate [data-figures]")).to_contain_text("to the first")
    expect(page.locator("#panel-generate [role=status]")).to_have_text("Finished: 60 tokens, ended by its length.")


def test_streaming_says_little_to_screen_readers(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate(
        """() => {
            window.said = [];
            for (const live of document.querySelectorAll("[role=status], [role=alert], [aria-live]"))
                new MutationObserver(() => said.push(live.textContent))
                    .observe(live, {childList: true, subtree: true, characterData: true});
        }"""
    )
    generate(page, max_new_tokens=40)
    said = [text for text in page.evaluate("said") if not text.startswith("ready")]
    assert said == ["Working.", "Finished: 40 tokens, ended by its length."]
    assert page.locator("#answers [aria-live]").count() == 0


def test_stop_ends_the_request_too(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    page.locator("#generate summary").click()
    page.get_by_label("ignore_eos").check()
    fill(page, max_new_tokens=900, temperature=1)
    start(page)
    expect(tokens(page).nth(5)).to_be_attached()
    assert live.num_running() == 1
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#panel-generate [data-figures]")).to_contain_text("stopped")
    number = tokens(page).count()
    assert 5 < number < 900
    deadline = time.monotonic() + 20
    while live.num_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live.num_running() == 0
    assert tokens(page).count() == number
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_focused()


def test_a_new_request_takes_the_place_of_a_running_one(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    fill(page, max_new_tokens=900, temperature=1)
    start(page)
    expect(tokens(page).nth(5)).to_be_attached()
    generate(page, max_new_tokens=3, temperature=0)
    expect(tokens(page)).to_have_count(3)
    expect(page.locator("#answers .text")).to_have_count(1)


def test_pointing_at_a_token_shows_its_alternatives(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    parameters = {"max_new_tokens": 8, "top_n_tokens": 5, "details": True}
    details = live.post("generate", {"inputs": "The President said", "parameters": parameters})["details"]
    generate(page, max_new_tokens=8, temperature=0)
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    tokens(page).nth(3).hover()
    expect(tip).to_be_visible()
    expect(tip).to_contain_text(f"id {details['tokens'][3]['id']}, log-probability")
    rows = tip.get_by_role("row")
    expect(rows).to_have_count(5)
    shown = [row.get_by_role("rowheader").inner_text() for row in rows.all()]
    assert shown == [top["text"].replace(" ", "␣") for top in details["top_tokens"][3]]
    expect(tip.locator("tr.chosen")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_keys_go_from_token_to_token(open_page: OpenPage) -> None:
    page = open_page()
    generate(page, max_new_tokens=6, temperature=0)
    page.locator("#answers .text").focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 5), ("ArrowLeft", 4), ("Home", 0)):
        page.keyboard.press(key)
        expect(tokens(page).nth(index)).to_be_focused()
        expect(tokens(page).nth(index)).to_have_attribute("aria-describedby", "tip")
        expect(page.get_by_role("tooltip")).to_contain_text("%")
    expect(page.locator("#answers [aria-describedby=tip]")).to_have_count(1)


def test_the_tint_can_be_switched_off(open_page: OpenPage) -> None:
    page = open_page()
    generate(page, max_new_tokens=30, temperature=1, seed=3)
    count_colours = "tokens => new Set(tokens.map(token => getComputedStyle(token).backgroundColor)).size"
    assert tokens(page).evaluate_all(count_colours) > 2
    page.get_by_label("Tint by probability").uncheck()
    assert tokens(page).evaluate_all(count_colours) == 1


def test_only_what_is_set_is_sent(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#generate summary").click()
    with page.expect_request("**/generate") as sent:
        generate(page, max_new_tokens="", temperature="", top_n_tokens="")
    assert body_of(sent.value) == {"inputs": "The President said", "parameters": {}, "stream": True}
    page.get_by_label("ignore_eos").check()
    with page.expect_request("**/generate") as sent:
        generate(page, inputs="So", max_new_tokens=5, top_p=0.9, stop="x\\ny\nz", repetition_penalty=1.2)
    assert body_of(sent.value)["parameters"] == {
        "max_new_tokens": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "stop": ["x\ny", "z"],
        "ignore_eos": True,
    }


def test_fields_are_parameters_of_the_service(open_page: OpenPage) -> None:
    page = open_page()
    for form, model in (("generate", GenerateParameters), ("classify", ClassifyParameters), ("qa", QAParameters)):
        names = page.locator(f"#{form} [data-kind]").evaluate_all("inputs => inputs.map(input => input.name)")
        known = {*model.model_fields, "model", "grammar.type", "grammar.value"}
        assert [name for name in names if name not in known] == []
    defaults = page.locator("[data-kind]").evaluate_all("inputs => inputs.map(i => [i.form.id, i.name, i.placeholder])")
    assert ["generate", "max_new_tokens", str(GenerateParameters().max_new_tokens)] in defaults
    assert ["qa", "max_answer_len", str(QAParameters().max_answer_len)] in defaults
    assert ["qa", "top_k", str(QAParameters().top_k)] in defaults


def test_a_drawn_seed_can_be_kept_to_its_last_digit(open_page: OpenPage) -> None:
    page = open_page()
    generate(page, max_new_tokens=12, temperature=1.2)
    text = tokens(page).all_text_contents()
    page.get_by_role("button", name="Keep seed").click()
    seed = page.locator("#generate-seed").input_value()
    with page.expect_request("**/generate") as sent:
        generate(page)
    assert body_of(sent.value)["parameters"]["seed"] == int(seed)
    assert tokens(page).all_text_contents() == text


def test_curl_says_the_same(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    fill(page, inputs="It's 5 o'clock,\nand", max_new_tokens=5, seed="9223372036854775807")
    page.get_by_role("button", name="Copy as curl").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    with page.expect_request("**/generate") as sent:
        generate(page)
    assert command[:3] == ["curl", "-N", f"{live.url}generate"]
    assert command[3:5] == ["-H", "Content-Type: application/json"]
    assert command[-2] == "-d"
    assert json.loads(command[-1]) == body_of(sent.value)
    assert json.loads(command[-1])["parameters"]["seed"] == 2**63 - 1


def test_text_is_copied_without_marks(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    grammar = {"type": "regex", "value": "(yes|no)\n\n(yes|no)"}
    generate_body = {"inputs": "Well:", "parameters": {"max_new_tokens": 9, "grammar": grammar}}
    expected = live.post("generate", generate_body)["generated_text"]
    page.locator("#generate summary").click()
    page.get_by_label("grammar type").select_option("regex")
    fill(page, **{"grammar.value": grammar["value"]})
    generate(page, inputs="Well:", max_new_tokens=9, temperature=0)
    page.get_by_role("button", name="Copy text").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == expected
    assert "\n\n" in expected


def test_what_a_stop_string_cuts_off_is_marked(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    whole = live.post("generate", {"inputs": "The President said", "parameters": {"max_new_tokens": 20}})
    stop = next(word for word in whole["generated_text"].split() if len(word) > 3)[:2]
    body = {"inputs": "The President said", "parameters": {"max_new_tokens": 20, "stop": [stop]}}
    expected = live.post("generate", body)["generated_text"]
    page.locator("#generate summary").click()
    generate(page, max_new_tokens=20, temperature=0, stop=stop)
    assert "".join(page.locator("#answers .token:not(.cut)").all_text_contents()) == expected
    assert "".join(page.locator("#answers .token.cut").all_text_contents()) != ""


def test_beams_come_whole(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page()
    page.locator("#generate summary").click()
    generate(page, max_new_tokens=6, temperature="", num_beams=3, num_return_sequences=2)
    body = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    expected = live.post("generate", {"inputs": "The President said", "parameters": body})
    texts = page.locator("#answers .text")
    assert texts.all_text_contents() == [answer["generated_text"] for answer in expected]
    expect(page.locator("#answers")).to_contain_text("2 of 2, beam score -")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("top_p", "2", "parameters.top_p=2"),
        ("min_p", "-1", "parameters.min_p=-1"),
        ("seed", "many", "parameters.seed='many'"),
        ("max_new_tokens", "2000", "exceed the model's context"),
        ("inputs", "", "inputs=''"),
        ("grammar.value", "(", "regex parse error"),
    ],
)
def test_an_error_is_shown_at_its_field(open_page: OpenPage, field: str, value: str, reason: str) -> None:
    page = open_page()
    if field.startswith("grammar"):
        page.locator("#generate summary").click()
        page.get_by_label("grammar type").select_option("regex")
    page.locator(f"#generate [name='{field}']").evaluate("(input, value) => { input.value = value; }", value)
    start(page)
    input_ = page.locator(f"#generate [name='{field}']")
    expect(input_).to_be_focused()
    expect(input_).to_have_attribute("aria-invalid", "true")
    expect(input_).to_have_accessible_description(re.compile(re.escape(reason)))
    expect(page.locator("#panel-generate [role=alert]")).to_have_text("")
    input_.fill("1" if field != "grammar.value" else "a|b")
    start(page)
    expect(input_).not_to_have_attribute("aria-invalid", "true")


def test_other_errors_are_alerts(open_page: OpenPage) -> None:
    page = open_page()
    error = {"error": "the service is full", "error_type": "overloaded"}
    page.route("**/generate", lambda route: route.fulfill(status=503, json=error, headers={"Retry-After": "2"}))
    start(page)
    expect(page.locator("#panel-generate [role=alert]")).to_have_text("the service is full (try again in 2 s)")
    page.unroute("**/generate")
    generate(page, max_new_tokens=2)
    expect(page.locator("#panel-generate [role=alert]")).to_have_text("")


def test_a_stream_that_breaks_is_taken_up_again(open_page: OpenPage, live: LiveApp) -> None:
    """The connection is cut in the middle of an event, twice, and then once refused."""
    page = open_page()
    body = {"inputs": "The ship", "parameters": {"max_new_tokens": 12, "seed": 3, "temperature": 1, "top_n_tokens": 5}}
    expected = live.post("generate", body)["generated_text"]
    asked_from = []

    def cut(route: Route) -> None:
        asked_from.append(route.request.headers.get("last-event-id"))
        if len(asked_from) == 3:
            route.fulfill(status=503, json={"error": "no pipeline", "error_type": "overloaded"})
            return
        response = route.fetch()
        whole = response.text().split("\n\n")
        cut_text = "\n\n".join(whole[:4]) + "\n\n" + whole[4][:20] if len(asked_from) < 3 else response.text()
        route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=cut_text)

    page.evaluate(
        """() => {
            window.said = [];
            const status = document.querySelector("#panel-generate [role=status]");
            new MutationObserver(() => said.push(status.textContent))
                .observe(status, {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.route("**/generate", cut)
    fill(page, inputs="The ship", max_new_tokens=12, seed=3, temperature=1)
    start(page)
    status = page.locator("#panel-generate [role=status]")
    expect(status).to_have_text("Finished: 12 tokens, ended by its length.", timeout=20_000)
    assert "".join(tokens(page).all_text_contents()) == expected
    assert page.evaluate("said") == [
        "Working.",
        *["The connection was lost. Reconnecting.", "Working."] * 2,
        "Finished: 12 tokens, ended by its length.",
    ]
    assert len(asked_from) == 4
    assert asked_from[0] is None
    assert asked_from[2] == asked_from[3]
    assert asked_from[1] != asked_from[2]


def test_the_rest_is_asked_for_again_after_the_time_that_the_service_says(open_page: OpenPage) -> None:
    """429: the broken stream still counts for the key."""
    page = open_page(prepare=lambda page: page.clock.install())
    token = {"id": 1, "text": " then", "logprob": -0.5, "special": False}
    details = {"finish_reason": "length", "generated_tokens": 2, "seed": 1}
    first = {"index": 1, "token": token, "generated_text": None, "details": None}
    last = {"index": 2, "token": token, "generated_text": " then then", "details": details}
    limit = {"error": "this API key may have 1 requests at a time", "error_type": "rate_limit"}
    answers = [
        {"content_type": "text/event-stream", "body": f"data: {json.dumps(first)}\nid: 1\n\n"},
        {"status": 429, "json": limit, "headers": {"Retry-After": "30"}},
        {"status": 429, "json": limit, "headers": {"Retry-After": "30"}},
        {"content_type": "text/event-stream", "body": f"data: {json.dumps(last)}\nid: 2\n\n"},
    ]
    asked = []

    def fulfill(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        route.fulfill(**answers.pop(0))

    page.route("**/generate", fulfill)
    start(page)
    said = page.locator("#panel-generate [role=status]")
    expect(said).to_have_text("The connection was lost. Reconnecting.")
    for num_asked in (2, 3):
        with page.expect_response("**/generate"):
            page.clock.run_for(1000 if num_asked == 2 else 30_000)
        page.clock.run_for(20_000)
        assert asked == [None, *["1"] * (num_asked - 1)]
    page.clock.run_for(10_000)
    expect(said).to_have_text("Finished: 2 tokens, ended by its length.")
    assert asked == [None, "1", "1", "1"]
    assert tokens(page).all_text_contents() == [" then", " then"]


def test_a_key_for_one_request_at_a_time_gets_the_rest_too(open_page: OpenPage, tmp_path: Path) -> None:
    """A real service, which takes the key for busy until another client has left."""
    key = "sk-limited-0001"
    (tmp_path / "keys.yaml").write_text(f"keys: [{{name: web, key: {key}, max_concurrent_requests: 1}}]\n")
    headers = {"Authorization": f"Bearer {key}"}
    parameters = {"max_new_tokens": 12, "seed": 3, "temperature": 1, "top_n_tokens": 5}
    body = {"inputs": "The ship", "parameters": parameters}
    endless = {"inputs": "The ship", "parameters": {"max_new_tokens": 900, "ignore_eos": True}, "stream": True}
    with (
        LiveApp(IngressConfig(api_keys_file=str(tmp_path / "keys.yaml"))) as app,
        httpx.Client(base_url=app.url, headers=headers, timeout=60) as client,
        ExitStack() as other_client,
    ):
        expected = client.post("generate", json=body).json()["generated_text"]
        page = open_page(app=app, prepare=lambda page: page.add_init_script(REMEMBER_KEY % json.dumps(key)))
        expect(page.locator("#state")).to_have_text("ready")
        statuses = []

        def cut(route: Route) -> None:
            response = route.fetch()
            statuses.append(response.status)
            if len(statuses) == 1:
                other_client.enter_context(client.stream("POST", "generate", json=endless))
                text = "\n\n".join(response.text().split("\n\n")[:4]) + "\n\n"
                route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=text)
                return
            other_client.close()
            route.fulfill(response=response)

        page.route("**/generate", cut)
        fill(page, inputs="The ship", max_new_tokens=12, seed=3, temperature=1)
        start(page)
        status = page.locator("#panel-generate [role=status]")
        expect(status).to_have_text("Finished: 12 tokens, ended by its length.", timeout=20_000)
        assert "".join(tokens(page).all_text_contents()) == expected
        assert statuses[:2] == [200, 429]
        assert statuses[-1] == 200


def test_a_stream_that_stays_broken_says_so(open_page: OpenPage) -> None:
    page = open_page(prepare=lambda page: page.clock.install())
    token = {"id": 1, "text": " then", "logprob": -0.5, "special": False}
    body = f"data: {json.dumps({'index': 1, 'token': token, 'generated_text': None, 'details': None})}\nid: 1\n\n"
    answers = [{"content_type": "text/event-stream", "body": body}]
    refused = {"status": 503, "json": {"error": "no pipeline", "error_type": "overloaded"}}
    asked = []

    def fulfill(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        route.fulfill(**(answers.pop() if answers else refused))

    page.route("**/generate", fulfill)
    start(page)
    said = page.locator("#panel-generate [role=status]")
    alert = page.locator("#panel-generate [role=alert]")
    expect(said).to_have_text("The connection was lost. Reconnecting.")
    for _ in range(60):
        page.clock.run_for(1000)
        if alert.text_content():
            break
    expect(alert).to_have_text("no pipeline")
    expect(said).to_have_text("")
    assert asked == [None, *["1"] * 6]
    assert tokens(page).all_text_contents() == [" then"]


def test_stop_ends_the_waiting_for_a_new_connection(open_page: OpenPage) -> None:
    page = open_page()
    token = {"id": 1, "text": " then", "logprob": -0.5, "special": False}
    body = f"data: {json.dumps({'index': 1, 'token': token, 'generated_text': None, 'details': None})}\nid: 1\n\n"
    page.route(
        "**/generate",
        lambda route: (
            route.fulfill(status=503, json={"error": "no pipeline", "error_type": "overloaded"})
            if "last-event-id" in route.request.headers
            else route.fulfill(content_type="text/event-stream", body=body)
        ),
    )
    start(page)
    said = page.locator("#panel-generate [role=status]")
    expect(said).to_have_text("The connection was lost. Reconnecting.")
    page.get_by_role("button", name="Stop").click()
    expect(said).to_have_text("Stopped.")


def test_an_error_in_a_stream_leaves_what_came_before(open_page: OpenPage) -> None:
    page = open_page()
    token = {"id": 1, "text": " then", "logprob": -0.5, "special": False}
    events = [{"index": 1, "token": token, "generated_text": None, "details": None}, {"error": "the stage was lost"}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    start(page)
    expect(page.locator("#panel-generate [role=alert]")).to_have_text("the stage was lost")
    assert tokens(page).all_text_contents() == [" then"]
