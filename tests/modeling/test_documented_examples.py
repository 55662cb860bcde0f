"""The examples in transformers' documents with only the import line changed, and those of docs/library.md."""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import SPECIAL_TOKEN, small_backend_json, small_tokenizer
from reference import pair
from transformers.utils.doc import PT_SAMPLE_DOCSTRINGS

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "library.md"
HUB_NAME = "EleutherAI/gpt-j-6B"

# From transformers' page on GPT-J. It samples; greedy is what can be compared.
GENERATION = f"""
>>> from transformers import GPTJForCausalLM, AutoTokenizer
>>> import torch
>>> device = "cpu"
>>> model = GPTJForCausalLM.from_pretrained("{HUB_NAME}", dtype=torch.float32, device_map="auto")
>>> tokenizer = AutoTokenizer.from_pretrained("{HUB_NAME}")
>>> prompt = (
...     "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
...     "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
...     "researchers was the fact that the unicorns spoke perfect English."
... )
>>> input_ids = tokenizer(prompt, return_tensors="pt").to(device).input_ids
>>> gen_tokens = model.generate(input_ids, max_length=250)
>>> gen_text = tokenizer.batch_decode(gen_tokens)[0]
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By class, a directory with a tiny model and its tokenizer."""
    directories = {}
    (eos,) = small_tokenizer().special_token_ids
    for name in ("GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"):
        directory = directories[name] = tmp_path_factory.mktemp(name)
        size = {"vocab_size": small_tokenizer().num_token_ids, "n_positions": 300, "eos_token_id": eos}
        pair(name, **size, pad_token_id=None)[0].save_pretrained(directory)
        (directory / "tokenizer.json").write_text(small_backend_json(), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(
            f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{SPECIAL_TOKEN}"}}'
        )
    return directories


def documented(name: str) -> list[str]:
    """What transformers shows for models of this class's task, each example as one text."""
    sample = PT_SAMPLE_DOCSTRINGS[name.removeprefix("GPTJFor")].format(
        model_class=name,
        checkpoint=HUB_NAME,
        expected_output="...",
        expected_loss="...",
        qa_target_start_index=14,
        qa_target_end_index=15,
    )
    return re.findall(r"```python\n(.*?)```", sample, re.DOTALL)


def run(example: str, package: str, directory: Path) -> dict[str, Any]:
    """The variables after an example."""
    code = "\n".join(part.source for part in doctest.DocTestParser().get_examples(example))
    code = code.replace("from transformers import", f"from {package} import").replace(HUB_NAME, str(directory))
    if package == "transformers":
        code = code.replace(', device_map="auto"', "")  # it would need accelerate
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


@pytest.mark.parametrize(
    ("name", "index", "compared"),
    [
        ("GPTJForSequenceClassification", 0, ["logits", "predicted_class_id", "loss"]),
        ("GPTJForSequenceClassification", 1, ["logits", "predicted_class_ids", "labels", "loss"]),
        ("GPTJForQuestionAnswering", 0, ["predict_answer_tokens", "answer_start_index", "answer_end_index", "loss"]),
    ],
)
def test_documented_example(checkpoints: dict[str, Path], name: str, index: int, compared: list[str]):
    example = documented(name)[index]
    theirs, ours = (run(example, package, checkpoints[name]) for package in ("transformers", "gptj_serve"))
    for variable in [*compared, "inputs"]:
        expected, value = theirs[variable], ours[variable]
        if variable == "inputs":
            expected, value = expected["input_ids"], value["input_ids"]
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert ours["loss"].isfinite()


def test_documented_generation(checkpoints: dict[str, Path]):
    theirs, ours = (
        run(GENERATION, package, checkpoints["GPTJForCausalLM"]) for package in ("transformers", "gptj_serve")
    )
    assert torch.equal(ours["gen_tokens"], theirs["gen_tokens"])
    assert ours["gen_text"] == theirs["gen_text"]
    assert ours["gen_tokens"].shape[1] > ours["input_ids"].shape[1]


def test_examples_of_the_document(checkpoints: dict[str, Path], tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names = ["GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering", "GPTJForCausalLM"]
    variables: dict[str, Any] = {"output_directory": tmp_path}
    for name, block in zip(names, blocks, strict=True):
        exec(block, variables | {"checkpoint": checkpoints[name], "torch": torch})
    saved = transformers.GPTJForSequenceClassification.from_pretrained(tmp_path)
    assert saved.config.num_labels == 2
