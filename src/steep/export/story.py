"""What a model card is made of: the base, what the gate measured, and the run, in words that hold on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import PretrainedConfig

from steep.errors import UserError
from steep.evaluation.score import DomainScore
from steep.export.base_weights import Kind
from steep.export.gate import Gap, Measured
from steep.model.fp8_published import is_published_fp8
from steep.model.resolve import ResolvedModel


@dataclass(frozen=True)
class Base:
    """The base model in words that hold on any machine.

    Attributes:
        name: hub name, or the last part of a path.
        on_hub: whether `name` is a name of the hub.
        revision: on the hub, if the run gave one.
        stored: how its checkpoint exists, where that is not 16 bits: ``GGUF``, ``4 or 8 bits (bitsandbytes)``,
            ``8 bits (e4m3)``.
        stored_by: the method that its config names for that, if it does.
        stretched: its config with the run's own scaling of positions, if the run named one.
        licence: `license`, `license_name` and `license_link` of its own card, as far as it has them.
    """

    name: str
    on_hub: bool
    revision: str | None = None
    stored: str | None = None
    licence: Mapping[str, Any] = field(default_factory=dict)
    stored_by: str | None = None
    stretched: PretrainedConfig | None = None


def describe_base(name: str, revision: str | None, resolved: ResolvedModel) -> Base:
    """What a card may say of a run's `model.name`.

    Args:
        resolved: the model as it was found, before a GGUF file becomes a folder.

    Raises:
        UserError: its own card is damaged.
    """
    on_hub = not Path(name).exists()
    stored = None
    if resolved.quantization:
        stored = "8 bits (e4m3)" if is_published_fp8(resolved.quantization) else "4 or 8 bits (bitsandbytes)"
    if name.endswith(".gguf"):
        stored = "GGUF"
    licence: dict[str, Any] = {}
    if (card := resolved.file("README.md")) is not None:
        try:
            stated = ModelCard.load(card, ignore_metadata_errors=True).data
        except (yaml.YAMLError, ValueError, OSError) as error:
            problem = f"{card} cannot be read: {str(error).splitlines()[0]}"
            raise UserError("model.name", problem, "Mend it: the export takes the licence from it.") from error
        for key in ("license", "license_name", "license_link"):
            if isinstance(value := stated.get(key), str):
                licence[key] = value
    return Base(
        name if on_hub else Path(name).name, on_hub, revision, stored, licence, resolved.stored_by, resolved.stretched
    )


@dataclass(frozen=True)
class Gated:
    """What the gate measured for a merged model.

    Attributes:
        kind: the base that was merged into.
        exact: whether that is what the adapter was trained over.
        gap: to the adapter.
        adapter, merged: both models' figures.
        other: the gap of the kind that was not kept, where both were measured.
        text: what was scored, in words.
        own: the adapter's scores with the products in fp8 that it was trained with, which `adapter` has none of; None
            where there were none, or no units for them.
    """

    kind: Kind
    exact: bool
    gap: Gap
    adapter: Measured
    merged: Measured
    other: Gap | None
    text: str
    own: Sequence[DomainScore] | None = None


@dataclass(frozen=True)
class Story:
    """What is known of a run, from its folder.

    Attributes:
        settings: `run.yaml`.
        plan, ledger, environment: the JSON files of those names.
        before, after: held-out scores of the base and of the result.
        roles: of each domain.
        scored_otherwise: in what these scores differ beside the weights, if they do.
    """

    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    ledger: Mapping[str, Any]
    environment: Mapping[str, Any]
    before: Sequence[DomainScore]
    after: Sequence[DomainScore]
    roles: Mapping[str, str]
    scored_otherwise: str | None = None
