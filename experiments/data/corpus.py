"""Text to predict byte by byte: the English documentation of Python's language, which every Python ships.

The corpus is `pydoc_data.topics`, the texts behind ``help("if")``.  It differs between versions of Python, which the
manifest of a run names.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from experiments.data.images import Images

TEST_EVERY = 4  # every fourth topic is tested on
LEAST = 40  # characters of a line that may occur in one part only; shorter ones are headings and code


def text(length: int, train: bool | None = None) -> Images:
    """Windows of ``length`` bytes, (N, length), and the bytes that follow each byte, (N, length).

    Windows do not overlap.  ``train``: those to train on (also with None), or those of the held-out topics.
    """
    tokens = _tokens(train is not False)
    num = (len(tokens) - 1) // length if length > 0 else 0
    if num < 1:
        raise ValueError(f"data.length must be between 1 and {len(tokens) - 1} bytes, got {length}.")
    windows, following = (tokens[begin : begin + num * length].reshape(num, length) for begin in (0, 1))
    return Images(windows, following, (), ())


@lru_cache(maxsize=1)
def documentation() -> tuple[bytes, bytes]:
    """The bytes to train on, and the bytes to test on.

    Topics in sorted order are joined with blank lines; numbers 3, 7, 11, ... are held out.  Topics quote each other, so
    paragraphs with a line of the training topics are left out of the held-out topics.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data=text needs the module pydoc_data of Python's standard library, which this installation lacks: "
            "install the whole standard library, or use data=arrays."
        ) from error
    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[TEST_EVERY - 1 :: TEST_EVERY]
    learned = [one for number, one in enumerate(texts) if number % TEST_EVERY != TEST_EVERY - 1]
    known = {line for one in learned for line in _lines(one)}
    paragraphs = [paragraph for one in held_out for paragraph in one.split("\n\n")]
    new = [paragraph for paragraph in paragraphs if not known.intersection(_lines(paragraph))]
    return "\n\n".join(learned).encode(), "\n\n".join(new).encode()


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LEAST]


@lru_cache(maxsize=2)
def _tokens(train: bool) -> Tensor:
    return torch.tensor(list(documentation()[not train]))
