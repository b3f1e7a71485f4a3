from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from steep.data.packing import Corpus, pack
from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """About 30 rows of 64 tokens and some held-out documents."""
    folder = write_corpus(tmp_path_factory.mktemp("small"), 20)
    return pack(folder, tokenizer, max_length=64, holdout=0.1, cache_dir=tmp_path_factory.mktemp("tokens"))
