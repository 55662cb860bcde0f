"""Classification and question answering in the page."""

import json
import re
import shlex

import pytest
from live_app import LiveApp, OpenPage
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

FAMILY = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
CONTEXT = (
    f"{FAMILY} \N{PARTY POPPER} Anna \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} lives in Paris {FAMILY}. "
    "She works at the museum. \N{MATHEMATICAL DOUBLE-STRUCK CAPITAL A}"
)
"""Characters of one, two and, in JavaScript's count, many units, before, beside and after the answers."""


def classify(page: Page) -> None:
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def answer(page: Page) -> None:
    page.get_by_role("button", name="Answer", exact=True).click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def labels(page: Page) -> list[list[str]]:
    """Of each text its labels and scores, as they are shown."""
    return [
        [item.inner_text().replace("\n", " ") for item in text.locator("li").all()]
        for text in page.locator("#texts section").all()
    ]


def bar_shares(page: Page) -> list[float]:
    return page.locator("#texts .bar").evaluate_all(
        "bars => bars.map(bar => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width)"
    )


def percent(score: float) -> str:
    return f"{100 * score:.{1 if score >= 0.0995 else 2 if score >= 0.001 else 3}f}\u202f%"


def test_labels_have_bars_and_scores(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page("#classify")
    classify(page)
    (expected,) = live.post("classify", {"inputs": "how much money is in my account", "parameters": {"top_k": 5}})
    assert labels(page) == [[f"{item['label']} {percent(item['score'])}" for item in expected]]
    assert bar_shares(page) == pytest.approx([item["score"] for item in expected], abs=0.02)
    said = page.locator("#panel-classify [role=status]")
    expect(said).to_have_text(re.compile(r"how much money is in my account: balance, \d+ %"))


def test_each_line_can_be_a_text(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page("#classify")
    page.get_by_label("Text", exact=True).fill("book a flight\n\nwhat is the weather")
    page.get_by_label("Each line is a text of its own").check()
    page.locator("#classify-top_k").fill("2")
    classify(page)
    expected = live.post("classify", {"inputs": ["book a flight", "what is the weather"], "parameters": {"top_k": 2}})
    assert labels(page) == [[f"{item['label']} {percent(item['score'])}" for item in items] for items in expected]
    assert page.locator("#texts h3").all_inner_texts() == ["book a flight", "what is the weather"]


def test_logits_are_numbers(open_page: OpenPage) -> None:
    page = open_page("#classify")
    page.get_by_label("function_to_apply").select_option("none")
    classify(page)
    (shown,) = labels(page)
    assert all(re.fullmatch(r"\w+ -?\d+\.\d{3}", line) for line in shown)
    assert bar_shares(page)[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("is_by_line", [False, True])
def test_labels_of_ones_own(open_page: OpenPage, live: LiveApp, is_by_line: bool) -> None:
    page = open_page("#classify")
    page.get_by_label("Labels of your own").check()
    page.get_by_label("candidate_labels").fill("money\nsport")
    page.get_by_label("Each line is a text of its own").set_checked(is_by_line)
    classify(page)
    text = "how much money is in my account"
    body = {"inputs": [text], "parameters": {"candidate_labels": ["money", "sport"]}}
    (expected,) = live.post("classify", body)
    pairs = zip(expected["labels"], expected["scores"], strict=True)
    assert labels(page) == [[f"{label} {percent(score)}" for label, score in pairs]]


def test_missing_labels_are_asked_for(open_page: OpenPage) -> None:
    page = open_page("#classify")
    page.get_by_label("Labels of your own").check()
    page.get_by_role("button", name="Classify", exact=True).click()
    field = page.get_by_label("candidate_labels")
    expect(field).to_be_focused()
    expect(field).to_have_accessible_description(re.compile(r"parameters\.candidate_labels="))


def test_a_head_can_be_chosen_where_there_are_several(open_page: OpenPage) -> None:
    heads = {"default": "classifier", "tone": "classifier", "reader": "qa"}
    page = open_page("#classify", status={"tasks": ["generate", "classify", "qa"], "heads": heads, "pipelines": []})
    page.locator("#classify-model").select_option("tone")
    with page.expect_request("**/classify") as sent:
        page.get_by_role("button", name="Classify", exact=True).click()
    assert json.loads(sent.value.post_data or "")["model"] == "tone"
    expect(page.locator("#classify-model")).to_have_accessible_description(re.compile("there is no such"))
    page.get_by_role("tab", name="Question answering").click()
    expect(page.locator("#qa-model")).to_be_hidden()


def test_the_answer_is_marked_at_its_characters(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page("#qa")
    page.locator("#qa-context").fill(CONTEXT)
    page.locator("#qa-top_k").fill("8")
    answer(page)
    body = {"inputs": {"question": "Where does Anna live?", "context": CONTEXT}, "parameters": {"top_k": 8}}
    expected = live.post("qa", body)
    choices = page.get_by_role("radio")
    expect(choices).to_have_count(8)
    expect(choices.first).to_be_checked()
    for index, item in enumerate(expected):
        choices.nth(index).check()
        assert page.locator("#context").text_content() == CONTEXT
        assert page.locator("#context mark").text_content() == item["answer"]
        before = page.locator("#context").evaluate("box => box.firstChild.textContent")
        assert before == CONTEXT[: item["start"]]
        expect(page.locator("#spans label").nth(index)).to_contain_text(percent(item["score"]))
    assert {item["answer"] for item in expected} >= {"Paris"}
    assert any(FAMILY in item["answer"] for item in expected), "no answer has a sequence of joined emoji in it"


def test_no_answer_marks_nothing(open_page: OpenPage) -> None:
    page = open_page("#qa")
    page.route("**/qa", lambda route: route.fulfill(json={"answer": "", "score": 0.9, "start": 0, "end": 0}))
    answer(page)
    expect(page.locator("#spans label")).to_contain_text("no answer in this context")
    assert page.locator("#context mark").count() == 0


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("question", "", "inputs.question=''"),
        ("context", "", "inputs.context=''"),
        ("top_k", "0", "parameters.top_k=0"),
    ],
)
def test_errors_are_shown_at_their_fields(open_page: OpenPage, name: str, value: str, reason: str) -> None:
    page = open_page("#qa")
    field = page.locator(f"#qa [name={name}]")
    field.fill(value)
    answer(page)
    expect(field).to_be_focused()
    expect(field).to_have_accessible_description(re.compile(re.escape(reason)))


def test_curl_has_neither_key_nor_unset_parameters(open_page: OpenPage, live: LiveApp) -> None:
    page = open_page("#qa")
    page.evaluate("sessionStorage.setItem('gptj_serve key /', 'secret')")
    page.reload()
    page.locator("#panel-qa [data-curl]").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert "Authorization: Bearer $API_KEY" in command
    assert "secret" not in " ".join(command)
    assert command[1] == f"{live.url}qa"
    question = {"question": "Where does Anna live?", "context": "Anna lives in Paris. She works at the museum."}
    assert json.loads(command[-1]) == {"inputs": question, "parameters": {"top_k": 3}}
