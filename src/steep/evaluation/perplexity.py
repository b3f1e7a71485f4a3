"""How well a model predicts whole documents, by domain.

Every token of a document after its first is predicted once, with all of the document before it as context, or at least
`max_length - stride` tokens of it where it is longer than `max_length`. Windows of several documents share a row and
don't see each other; each has a row of its own where the model would let them. Training loss is something else: there
a document that is cut at a row's end loses its context.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from steep.errors import UserError
from steep.evaluation.logits import Head, agrees, find_head, losses_from_hidden, losses_from_logits
from steep.evaluation.mode import inference_mode, input_device
from steep.evaluation.score import DomainScore
from steep.evaluation.separation import keeps_documents_apart
from steep.evaluation.windows import Batch, Row, apart, pack, windows
from steep.model.unwrap import unwrap

Progress = Callable[[str, int, int], None]
"""Called after each batch with the domain, its tokens scored so far, and all that will be scored in it."""

BATCH_TOKENS = 8192
_PROBE_TOKENS = 32
_PICKING_SEED = 0


class Document(Protocol):
    """What is scored: `tokens` int32 [T], as training has them (beginning, end), and the UTF-8 bytes of its text."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...

    @property
    def num_bytes(self) -> int: ...


def within_a_step(rows: int, max_length: int) -> int:
    """`evaluate`'s `batch_tokens` beside a training whose forwards have so many rows: no more than these have, so that
    scoring needs no more memory than what was planned for a step.
    """
    return min(BATCH_TOKENS, rows * max_length)


def evaluate(
    model: nn.Module,
    documents: Mapping[str, Sequence[Document]],
    *,
    max_length: int = 2048,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    step: int = 0,
    autocast_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[DomainScore]:
    """Score each domain's documents, in the mapping's order.

    Losses are fp32 a token, summed in float64. Nothing of the model changes: every module's mode comes back, gradients
    and gradient checkpointing are left alone. Documents of one token have nothing to score and count for nothing.

    Args:
        model: a transformers causal LM, or a PeftModel around one; as it stands, adapters and all.
        documents: the documents of each domain.
        max_length: tokens that the model reads at once.
        stride: new tokens of each later window of a long document; half of `max_length` by default.
        batch_tokens: tokens of one forward, rounded down to whole rows of `max_length`, at least one row.
        max_tokens: stop a domain before the document that would score more tokens than this; one is always scored.
            Documents are picked in a shuffled order, the same for every model, and scored in their own.
        step: optimizer steps done, for the record.
        autocast_dtype: run the model under `torch.autocast` with this dtype.
        progress: called after each batch.

    Raises:
        UserError: a limit is out of range, a domain has nothing to score, or a token is outside the vocabulary.
    """
    stride = max_length // 2 if stride is None else stride
    _check_limits(max_length, stride, batch_tokens, max_tokens)
    vocabulary = unwrap(model).config.get_text_config(decoder=True).vocab_size
    chosen = {
        domain: [sequence[index] for index in choose(domain, sequence, max_tokens)]
        for domain, sequence in documents.items()
    }
    for domain, domain_documents in chosen.items():
        _check_ids(domain, domain_documents, vocabulary)
    scores: list[DomainScore] = []
    with inference_mode(model, autocast_dtype):
        scorer: Scorer | None = None
        for domain, domain_documents in chosen.items():
            cut = (window for document in domain_documents for window in windows(document.tokens, max_length, stride))
            rows = pack(cut, max_length)
            # Once, on the first row: is the head all that lies between the hidden states and the model's logits, and do
            # documents not see each other?
            scorer = scorer or Scorer(model, rows[0])
            rows = rows if scorer.packs else apart(rows)
            num_tokens, done, nats = sum(len(document.tokens) - 1 for document in domain_documents), 0, 0.0
            for batch in scorer.batches(rows, max(1, batch_tokens // max_length)):
                losses = scorer.losses(batch)
                nats += losses.cpu().double().sum().item()
                done += len(losses)
                if progress is not None:
                    progress(domain, done, num_tokens)
            score = DomainScore.from_nats(
                nats,
                step=step,
                domain=domain,
                tokens=num_tokens,
                num_bytes=sum(document.num_bytes for document in domain_documents),
                documents=len(domain_documents),
            )
            scores.append(score)
    return scores


class Scorer:
    """Scores batches by tiles of the head where that gives the model's own logits, else through the model itself."""

    def __init__(self, model: nn.Module, first_row: Row) -> None:
        self.model = model
        self.device = input_device(model)
        # Only a single sequence is read as packed by transformers' flash attention, so there a batch is one long row.
        self.flatten = "flash" in (unwrap(model).config._attn_implementation or "")
        probe = torch.from_numpy(first_row.windows[0].tokens[None, :_PROBE_TOKENS].astype(np.int64)).to(self.device)
        self.head: Head | None = find_head(model)
        if self.head is None or not agrees(self.head, model, probe):
            self.head = None
            warnings.warn(
                f"{type(unwrap(model)).__name__} makes its logits in a way that is not known here, so evaluation goes "
                "through its own forward, one row at a time: right, but slower, and a row's logits exist whole",
                stacklevel=3,
            )
        self.packs = keeps_documents_apart(model)
        if not self.packs:
            warnings.warn(
                f"{type(unwrap(model)).__name__} lets the documents of a row see each other, so evaluation gives each "
                "a row of its own: right, but slower",
                stacklevel=3,
            )

    def batches(self, rows: Sequence[Row], rows_each: int) -> Iterator[Batch]:
        rows_each = rows_each if self.head is not None else 1
        for start in range(0, len(rows), rows_each):
            batch = Batch.of(rows[start : start + rows_each], self.device)
            yield batch.as_one_row() if self.flatten and self.packs else batch

    def losses(self, batch: Batch) -> torch.Tensor:
        """Nats of each scored token, fp32 [N]."""
        # With a cache or an attention mask transformers lets packed documents see each other, and says nothing.
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if self.head is None:
            logits = self.model(**inputs).logits
            return losses_from_logits(logits.flatten(0, 1), batch.scored, batch.targets)
        hidden = self.head.decoder(**inputs).last_hidden_state
        return losses_from_hidden(self.head, hidden.flatten(0, 1), batch.scored, batch.targets)


def choose(domain: str, documents: Sequence[Document], max_tokens: int | None) -> list[int]:
    """The documents to score, by index: whole, while they fit into `max_tokens`.

    They are picked in a shuffled order, since a domain's sources follow one another and a part of it from the front may
    be of the first source only. The order depends on the number of documents alone, so the base and the trained model
    are scored on the same ones at every step.

    Raises:
        UserError: nothing to score.
    """
    chosen: list[int] = []
    total = num_bytes = 0
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence((_PICKING_SEED, len(documents)))))
    for index in random.permutation(len(documents)).tolist():
        document = documents[index]
        scored = len(document.tokens) - 1
        if scored < 1:
            continue
        if chosen and max_tokens is not None and total + scored > max_tokens:
            break
        chosen.append(index)
        total += scored
        num_bytes += document.num_bytes
    if not num_bytes:
        raise UserError(
            f"documents[{domain!r}]",
            "no document has text to score",
            "Give the domain documents of at least two tokens, or leave it out",
        )
    return sorted(chosen)


def _check_ids(domain: str, documents: Sequence[Document], vocabulary: int) -> None:
    if any(not 0 <= document.tokens.min() <= document.tokens.max() < vocabulary for document in documents):
        raise UserError(
            f"documents[{domain!r}]",
            f"a token is outside the model's vocabulary of {vocabulary}",
            "Prepare the documents with this model's tokenizer",
        )


def _check_limits(max_length: int, stride: int, batch_tokens: int, max_tokens: int | None) -> None:
    if max_length < 2:
        raise UserError("max_length", f"{max_length} leaves no token to predict", "Use at least 2")
    if not 1 <= stride < max_length:
        raise UserError("stride", f"{stride} is not in [1, {max_length})", "Use half of max_length, the default")
    if batch_tokens < 1:
        raise UserError("batch_tokens", f"{batch_tokens} is not positive", "Use the tokens that fit into one forward")
    if max_tokens is not None and max_tokens < 1:
        raise UserError("max_tokens", f"{max_tokens} is not positive", "Use None to score everything")
