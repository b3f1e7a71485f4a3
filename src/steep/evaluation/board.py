"""What was learned against what was kept, on one board.

Continued pretraining is judged by both at once: bits per byte of the trained domains should fall, and those of replay
and held-out domains should not rise. Colour only repeats what arrows and words say, so the board can be piped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from steep.errors import UserError, one_line
from steep.evaluation.score import DomainScore

_SECTIONS = {"learned": ("train",), "kept or forgotten": ("replay", "heldout")}


def board(
    before: Sequence[DomainScore],
    after: Sequence[DomainScore],
    roles: Mapping[str, str],
    title: str = "base → trained",
) -> Table:
    """Base against trained, domain by domain, in `before`'s order within each section.

    Where new tokens cut the text another way, perplexity cannot be compared and is not shown; bits a byte can.

    Args:
        before: the base model's scores.
        after: the trained model's scores of the same domains.
        roles: "train", "replay" or "heldout" for each domain.
        title: what the two are.

    Raises:
        UserError: the two lists have different domains or documents, or a domain has no such role.
    """
    trained = {score.domain: score for score in after}
    _check(before, trained, roles)
    # Few lines and no margins: it should fit 80 columns.
    table = Table(title=Text(one_line(title)), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("domain")
    for heading in ("bits/byte", "difference", "perplexity", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for section, members in _SECTIONS.items():
        scores = [score for score in before if roles[score.domain] in members]
        if scores:
            table.add_section()
            table.add_row(Text(section, style="bold"))
        for base in scores:
            now = trained[base.domain]
            table.add_row(
                Text(one_line(f"  {base.domain}" if len(members) == 1 else f"  {base.domain} ({roles[base.domain]})")),
                f"{base.bits_per_byte:.3f} → {now.bits_per_byte:.3f}",
                _difference(now.bits_per_byte - base.bits_per_byte),
                f"{_perplexity(base)} → {_perplexity(now)}" if base.tokens == now.tokens else "of other tokens",
                f"{base.tokens:,}" if base.tokens == now.tokens else f"{base.tokens:,} → {now.tokens:,}",
            )
    return table


def gate_table(
    adapter: Sequence[DomainScore],
    merged: Mapping[str, Sequence[DomainScore]],
    in_fp8: Sequence[DomainScore] | None = None,
) -> Table:
    """Bits per byte of an adapter beside those of models that it was merged into, domain by domain.

    Args:
        merged: what was merged into → the scores of the same documents.
        in_fp8: those of the adapter with products in fp8, where it was trained with them.
    """
    others = {
        **({"in fp8": in_fp8} if in_fp8 is not None else {}),
        **{f"merged, {kind}": merged[kind] for kind in merged},
    }
    table = Table(title="bits/byte", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("domain")
    table.add_column("adapter", justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for index, score in enumerate(adapter):
        gaps = [(scores[index].bits_per_byte, score.bits_per_byte) for scores in others.values()]
        shown = [f"{now:.4f} ({now - before:+.4f})" for now, before in gaps]
        table.add_row(Text(one_line(score.domain)), f"{score.bits_per_byte:.4f}", *shown)
    return table


def _perplexity(score: DomainScore) -> str:
    return f"{score.perplexity:,.0f}" if score.perplexity >= 100 else f"{score.perplexity:.2f}"


def _difference(bits_per_byte: float) -> Text:
    if math.isnan(bits_per_byte):
        return Text("not a number", style="bold red")
    shown = f"{bits_per_byte:+.3f}"
    if shown in ("+0.000", "-0.000"):
        return Text("0.000 = same")
    if bits_per_byte < 0:
        return Text(f"{shown} ↓ better", style="green")
    return Text(f"{shown} ↑ worse", style="red")


def _check(before: Sequence[DomainScore], trained: Mapping[str, DomainScore], roles: Mapping[str, str]) -> None:
    known = [role for members in _SECTIONS.values() for role in members]
    base_texts = {score.domain: (score.documents, score.bytes) for score in before}
    if base_texts != {domain: (score.documents, score.bytes) for domain, score in trained.items()}:
        raise UserError(
            "after",
            "the trained model's scores are not of the documents that the base model's are of",
            "Evaluate both on the same domains, with the same limits",
        )
    for domain in base_texts:
        if roles.get(domain) not in known:
            raise UserError(
                f"roles[{domain!r}]", f"{roles.get(domain)!r} is not a role", f"Use one of {', '.join(known)}"
            )
