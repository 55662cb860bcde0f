"""Labels, templates and scores."""

import math

import pytest
from fakes import small_tokenizer

from gptj_serve import zero_shot
from gptj_serve.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("labels", "parsed"),
    [("a", ["a"]), ("a, b c ,d", ["a", "b c", "d"]), (" a ,, ", ["a"]), (["a, b", "c"], ["a, b", "c"])],
)
def test_labels_are_a_list_or_separated_by_commas(labels, parsed):
    assert zero_shot.parse_labels(labels) == parsed


@pytest.mark.parametrize("labels", ["", " , ", [], [" "]])
def test_no_label_at_all_is_refused(labels):
    with pytest.raises(InvalidRequestError, match="candidate_labels"):
        zero_shot.parse_labels(labels)


@pytest.mark.parametrize(
    ("template", "opening", "rest"),
    [
        ("This example is {}.", "This example is", " sports."),
        ("{}", "", "sports"),
        ("({})", "(", "sports)"),
        ("About {0.__class__} {}", "About {0.__class__}", " sports"),
    ],
)
def test_a_hypothesis_is_cut_before_the_blank_of_its_label(template: str, opening: str, rest: str):
    assert zero_shot.make_hypothesis(template, "sports") == zero_shot.Hypothesis(opening, rest)


def test_a_template_without_a_place_for_the_label_is_refused():
    with pytest.raises(InvalidRequestError, match="hypothesis_template='This is it'"):
        zero_shot.make_hypothesis("This is it", "sports")


def test_a_label_or_a_place_for_it_that_is_there_twice_is_refused():
    with pytest.raises(InvalidRequestError, match="candidate_labels='a': is there twice"):
        zero_shot.parse_labels("b, a,a")
    with pytest.raises(InvalidRequestError, match=r"must have one \{\}"):
        zero_shot.make_hypothesis("{} or not {}?", "sports")


def test_the_neutral_prompt_begins_a_document():
    hypothesis = zero_shot.Hypothesis("It is", " x")
    encode = small_tokenizer().encode
    assert zero_shot.prompt(small_tokenizer(), "Text", hypothesis) == encode("Text\nIt is")
    assert zero_shot.neutral_prompt(small_tokenizer(), hypothesis, 7) == [7, *encode("\nIt is")]
    assert zero_shot.neutral_prompt(small_tokenizer(), hypothesis, None) == encode("\nIt is")


def test_what_a_label_is_worth_anywhere_is_taken_off():
    given, neutral = [-4.0, -2.0, -900.0], [-6.0, -1.0, -897.0]
    one = zero_shot.label_probabilities(given, neutral, multi_label=False)
    weights = [math.exp(2), math.exp(-1), math.exp(-3)]
    assert one == pytest.approx([weight / sum(weights) for weight in weights])
    many = zero_shot.label_probabilities(given, neutral, multi_label=True)
    assert many == pytest.approx([1 / (1 + math.exp(-x)) for x in (2, -1, -3)])
    assert zero_shot.label_probabilities([-1e4], [0.0], multi_label=False) == [0.0]
