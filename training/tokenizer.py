"""The demo's byte-level BPE: GPT-2's pre-tokenizer and decoder, 4,096 entries of its own, `<|endoftext|>` the last."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.sources import read_intents, read_questions, read_texts

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"


def end_of_text_id(tokenizer: Tokenizer) -> int:
    number = tokenizer.token_to_id(END_OF_TEXT)
    if number is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
    return number


def train_tokenizer(data: Path) -> Tokenizer:
    """Learn the merges from the training parts alone; the same data gives the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(data), trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} entries, expected {VOCAB_SIZE}")
    return tokenizer


def training_texts(data: Path) -> Iterator[str]:
    for text in read_texts(data):
        yield from text.train.splitlines()
    for sentence, _ in read_intents(data).train:
        yield sentence
    train, _ = read_questions(data)
    yield from dict.fromkeys(question.context for question in train)
    for question in train:
        yield question.question


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers' `AutoTokenizer` asks for."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
