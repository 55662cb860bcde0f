"""How the `.jsonl` files here were made: `python make_items.py pride_and_prejudice.txt war_of_the_worlds.txt`.

Both texts are those of Project Gutenberg without its header. Paragraphs are joined to one line each.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

NUM_ITEMS_OF_A_BOOK = 50
NUM_PAGES_OF_A_BOOK = 6
PAGE_CHARACTERS = 2400  # some 700 tokens of the demo's


def paragraphs(book: Path) -> list[str]:
    joined = (" ".join(paragraph.split()) for paragraph in book.read_text(encoding="utf-8").split("\n\n"))
    return [paragraph for paragraph in joined if "_" not in paragraph and not paragraph.isupper()]


def last_words(texts: list[str]) -> Iterator[str]:
    """Beginnings of paragraphs up to a sentence whose last word was said before, as in LAMBADA; without its point."""
    for text in texts:
        for end in re.finditer(r"\s([a-zA-Z]{2,})[.!?](?=\s|$)", text):
            words = re.findall(r"\w+", text[: end.start()])
            if 30 <= len(words) <= 120 and end[1] in words:
                yield text[: end.end(1)]
                break


def next_sentences(texts: list[str], chance: random.Random) -> Iterator[dict[str, object]]:
    """Two sentences of a paragraph, and what follows: the third of it, or that of another paragraph."""
    split = [re.split(r"(?<=[a-z][.!?])\s(?=[A-Z])", text) for text in texts]
    contexts = [(sentences[:2], sentences[2]) for sentences in split if len(sentences) >= 3]
    contexts = [(before, following) for before, following in contexts if 30 <= len(following) <= 120]
    for sentences, following in contexts:
        others = [other for _, other in chance.sample(contexts, 4) if other != following][:3]
        label = chance.randrange(4)
        choices = [*others[:label], following, *others[label:]]
        yield {"context": " ".join(sentences), "choices": choices, "label": label}


def pages(texts: list[str], chance: random.Random) -> Iterator[str]:
    book = "\n\n".join(texts)
    starts = [match.end() for match in re.finditer("\n\n", book) if match.end() + PAGE_CHARACTERS < len(book)]
    for start in chance.sample(starts, NUM_PAGES_OF_A_BOOK):
        yield book[start : start + PAGE_CHARACTERS].rpartition(" ")[0]


def main() -> None:
    chance = random.Random(0)
    here = Path(__file__).parent
    words: list[dict[str, object]] = []
    sentences: list[dict[str, object]] = []
    whole: list[dict[str, object]] = []
    for book in map(Path, sys.argv[1:]):
        texts = paragraphs(book)
        words += [{"text": text} for text in chance.sample(list(last_words(texts)), NUM_ITEMS_OF_A_BOOK)]
        sentences += chance.sample(list(next_sentences(texts, chance)), NUM_ITEMS_OF_A_BOOK)
        whole += [{"page": page} for page in pages(texts, chance)]
    for name, items in (("last_words", words), ("next_sentences", sentences), ("pages", whole)):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (here / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
