"""Random configs, weights, padding, masks and arguments: each class against transformers' own, hundreds of times."""

import random
from typing import Any

import pytest
import torch
from reference import CLASSES, assert_same_gradients, assert_same_output, pair

from gptj_serve.model.block import ACTIVATIONS

NUM_SEEDS = 80  # for each class

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def random_config(rng: random.Random, name: str) -> dict[str, Any]:
    n_head = rng.choice([1, 2, 3])
    head_dim = rng.choice([2, 4, 6, 8])
    vocab_size = rng.randint(8, 50)
    return {
        "vocab_size": vocab_size,
        "n_positions": rng.randint(14, 40),
        "n_embd": n_head * head_dim,
        "n_head": n_head,
        "n_layer": rng.randint(1, 3),
        "rotary_dim": rng.choice(range(2, head_dim + 1, 2)),
        "n_inner": rng.choice([None, 5, 24]),
        "activation_function": rng.choice(sorted(ACTIVATIONS)),
        "layer_norm_epsilon": rng.choice([1e-5, 1e-3, 0.1]),
        "num_labels": 2 if name == "GPTJForQuestionAnswering" else rng.randint(1, 4),
        "use_cache": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.2,
        "pad_token_id": vocab_size - 1,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }


def random_mask(rng: random.Random, rows: int, columns: int) -> torch.Tensor:
    """Padding on the left, on the right, or holes anywhere (rows without a visible token included)."""
    kind = rng.choice(["left", "right", "holes"])
    mask = torch.ones(rows, columns, dtype=rng.choice([torch.long, torch.bool, torch.float]))
    for row in range(rows):
        count = rng.randint(0, columns - 1)
        if kind == "holes":
            hidden = rng.sample(range(columns), count + rng.randint(0, 1))
        else:
            hidden = list(range(count) if kind == "left" else range(columns - count, columns))
        mask[row, hidden] = 0
    return mask


def random_arguments(rng: random.Random, name: str, config: dict[str, Any]) -> dict[str, Any]:
    rows, columns = rng.randint(1, 3), rng.randint(1, 10)
    vocab_size = config["vocab_size"]
    arguments: dict[str, Any] = {}
    if rng.random() < 0.75:
        arguments["input_ids"] = torch.randint(0, vocab_size, (rows, columns))
        for row in range(rows):  # padding that a classifier must see, on either side
            side = rng.choice([slice(0, rng.randint(0, columns)), slice(rng.randint(0, columns), None)])
            arguments["input_ids"][row, side] = config["pad_token_id"]
    else:
        arguments["inputs_embeds"] = torch.randn(rows, columns, config["n_embd"])
    choice = rng.random()
    if choice < 0.6:
        arguments["attention_mask"] = random_mask(rng, rows, columns)
    elif choice < 0.75:
        arguments["attention_mask"] = torch.randn(rng.choice([1, rows]), 1, columns, columns)
    if rng.random() < 0.3:
        arguments["token_type_ids"] = torch.randint(0, vocab_size, (rows, columns))
    if rng.random() < 0.4:
        arguments["position_ids"] = torch.randint(0, config["n_positions"], (rng.choice([1, rows]), columns))
        if rng.random() < 0.5:  # two sequences packed in one row
            cut = rng.randint(0, columns)
            arguments["position_ids"] = torch.cat([torch.arange(cut), torch.arange(columns - cut)])[None]
    for flag in ("output_attentions", "output_hidden_states", "return_dict"):
        if (value := rng.choice([None, True, False])) is not None:
            arguments[flag] = value
    if name != "GPTJForQuestionAnswering" and (value := rng.choice([None, True, False])) is not None:
        arguments["use_cache"] = value
    if name == "GPTJForQuestionAnswering" and not config["use_cache"]:
        arguments["return_dict"] = True  # transformers' tuple then lacks the hidden states
    return arguments | random_labels(rng, name, config, rows, columns)


def random_labels(rng: random.Random, name: str, config: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    if name == "GPTJModel" or rng.random() < 0.3:
        keep: int | torch.Tensor = rng.choice([0, 1, rng.randint(1, columns)])
        if rng.random() < 0.5:
            keep = torch.randint(0, columns, rng.choice([(2,), (rows, 2)]))
        return {"logits_to_keep": keep} if name == "GPTJForCausalLM" else {}
    if name == "GPTJForCausalLM":
        labels = torch.randint(0, config["vocab_size"], (rows, columns))
        return {"labels": labels.masked_fill(torch.rand(rows, columns) < 0.3, -100)}
    if name == "GPTJForQuestionAnswering":
        shape = rng.choice([(rows,), (rows, 1)])
        return {side: torch.randint(-2, columns + 3, shape) for side in ("start_positions", "end_positions")}
    num_labels = config["num_labels"]
    if num_labels == 1:
        return {"labels": torch.randn(rows)}
    if rng.random() < 0.5:
        return {"labels": torch.randint(0, num_labels, (rows,))}
    config["problem_type"] = rng.choice([None, "regression", "multi_label_classification"])
    return {"labels": torch.rand(rows, num_labels)}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("block", range(4))
def test_output_and_gradients_equal_transformers(name: str, block: int):
    for seed in range(block * NUM_SEEDS // 4, (block + 1) * NUM_SEEDS // 4):
        rng = random.Random(f"{name} {seed}")
        torch.manual_seed(seed)
        config = random_config(rng, name)
        arguments = random_arguments(rng, name, config)
        theirs, ours = pair(name, seed, **config)
        try:
            reference, output = theirs(**arguments), ours(**arguments)
            assert_same_output(output, reference)
            if hasattr(reference, "keys") and "loss" in reference and reference.loss.isfinite():
                reference.loss.backward()
                output.loss.backward()
                assert_same_gradients(ours, theirs)
            if name == "GPTJForSequenceClassification":
                assert ours.config.problem_type == theirs.config.problem_type
        except Exception as error:
            error.add_note(f"seed {seed}: {config}, {', '.join(arguments)}")
            raise


@pytest.mark.parametrize("name", CLASSES[:3])
def test_going_on_from_a_cache_equals_transformers(name: str):
    for seed in range(15):
        rng = random.Random(f"cache {name} {seed}")
        torch.manual_seed(seed)
        config = random_config(rng, name)
        theirs, ours = pair(name, seed, **config)
        rows, columns = rng.randint(1, 3), rng.randint(3, 10)
        ids = torch.randint(0, config["vocab_size"], (rows, columns))
        mask = random_mask(rng, rows, columns) if rng.random() < 0.6 else None
        cuts = sorted(rng.sample(range(1, columns), 2))
        caches: tuple[Any, Any] = (None, None)
        for start, end in zip([0, *cuts], [*cuts, columns], strict=True):
            arguments: dict[str, Any] = {"input_ids": ids[:, start:end], "use_cache": True, "output_attentions": True}
            if mask is not None:
                arguments["attention_mask"] = mask[:, :end]
            reference = theirs(**arguments, cache=caches[0])
            output = ours(**arguments, cache=caches[1])
            assert_same_output(output, reference)
            caches = (reference.cache, output.cache)


@pytest.mark.parametrize("name", CLASSES)
def test_training_with_dropout_equals_transformers(name: str):
    """The same masks are drawn from the same seed, so losses and gradients agree in train mode too."""
    labels = {
        "GPTJModel": {},
        "GPTJForCausalLM": {"labels": torch.randint(0, 60, (2, 7))},
        "GPTJForSequenceClassification": {"labels": torch.tensor([0, 1])},
        "GPTJForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 6])},
    }[name]
    for seed, rates in enumerate([(0.1, 0.2, 0.3), (0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)]):
        config = dict(zip(("embd_pdrop", "resid_pdrop", "attn_pdrop"), rates, strict=True))
        theirs, ours = pair(name, seed, **config)
        arguments = {"input_ids": torch.randint(0, 60, (2, 7)), "output_attentions": True, **labels}
        outputs = []
        for model in (theirs.train(), ours.train()):
            torch.manual_seed(seed)
            outputs.append(model(**arguments))
            (outputs[-1].loss if labels else outputs[-1].last_hidden_state.square().mean()).backward()
        assert_same_output(outputs[1], outputs[0])
        assert_same_gradients(ours, theirs)
        assert not torch.equal(ours(**arguments)[0], ours.eval()(**arguments)[0])
