"""The tokenizer of the tiny model, and guides for its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import EOS, VOCAB

from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="module")
def guides(tokenizer: Tokenizer) -> Iterator[Guides]:
    made = Guides(tokenizer, VOCAB, frozenset({EOS}))
    yield made
    made.close()
