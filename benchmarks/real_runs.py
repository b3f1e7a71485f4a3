"""What benchmarks of whole runs share: the text is tokenised once, and scores stand alike in a line of results."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable

from steep.data.packing import tokenize_sources
from steep.evaluation.score import DomainScore
from steep.model.resolve import read_tokenizer, resolve
from steep.schema import RunConfig
from steep.storage import cache_folder


def tokenise_once(configs: Iterable[RunConfig]) -> None:
    """Put the tokens of all texts into the cache; of several processes the first does it, and the others wait."""
    folder = cache_folder() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        for config in configs:
            tokenize_sources(config.data.sources, read_tokenizer(resolve(config.model.name)))
    finally:
        os.close(held)


def columns(scores: Iterable[DomainScore], domains: Iterable[str]) -> dict[str, dict[str, float]]:
    """Loss (nats a token) and bits a byte of each domain."""
    found = {score.domain: {"loss": score.loss, "bits_per_byte": score.bits_per_byte} for score in scores}
    return {domain: found[domain] for domain in domains}
