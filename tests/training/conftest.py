from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # this file is read before Triton is told to interpret, which it is when it is first imported
    from transformers import PreTrainedTokenizerFast

    from steep.data.packing import Corpus


@pytest.fixture(scope="session")
def corpus(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """About 30 rows of 64 tokens and some held-out documents."""
    from steep.data.packing import pack
    from tests.tiny import write_corpus

    folder = write_corpus(tmp_path_factory.mktemp("small"), 20)
    return pack(folder, tokenizer, max_length=64, holdout=0.1, cache_dir=tmp_path_factory.mktemp("tokens"))
