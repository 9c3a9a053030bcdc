"""Makes a text to choose a recipe by that is written as Penn Treebank is, which itself is kept for the end.

Lower case, no punctuation, `<unk>` for rare words, `N` for numbers, a sentence a line: from those articles of WikiText-2
train's `<unk>` form that are not trained on.
"""

from __future__ import annotations

import re
from pathlib import Path

from nuteprune.data import read_documents
from nuteprune.files import save_text

UNK, TRAINED_ON = "train/wikitext2_train_unk.jsonl.gz", "train/wikitext2_train_raw_part.jsonl.gz"
EVERY = 45  # articles: a spread of subjects, and enough for 64 windows of 1,024 tokens


def plain(data: Path, target: Path) -> Path:
    """The text's file, made where it is not there yet; `data` is the folder of the data sets."""
    if not target.is_file():
        trained_on = [title(text) for text in read_documents(str(data / TRAINED_ON))]
        kept = [text for text in read_documents(str(data / UNK)) if title(text) not in [*trained_on, None]][::EVERY]
        # Titles with rare words are looked at after the choice, which stays that of the results there are.
        kept = [text for text in kept if not any(same(title(text), other) for other in trained_on)]
        save_text(target, "".join(f" {line} \n" for text in kept for line in sentences(text)))
    return target


def title(text: str) -> str | None:
    """The article's title; None for a piece that does not begin with one."""
    found = re.match(r"\s*= ([^=]+) =\s*\n", text)
    return found and found[1]


def same(masked: str | None, other: str | None) -> bool:
    """Whether a title whose rare words are `<unk>` can be another one."""
    words, others = (masked or "").split(), (other or "").split()
    return len(words) == len(others) and all(a in (b, "<unk>") for a, b in zip(words, others))


def sentences(text: str) -> list[str]:
    """The sentences of an article, without its headings."""
    found = []
    for line in text.split("\n"):
        if line.strip() and not line.strip().startswith("="):
            joined = re.sub(r" @(.)@ ", r"\1", line.lower())
            for sentence in re.split(r" [.!?;] ", joined):
                words = ["N" if re.search(r"\d", word) else word for word in sentence.split() if re.search(r"\w|[$%&]", word)]
                if len(words) > 1:
                    found.append(" ".join(words))
    return found
