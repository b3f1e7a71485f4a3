"""What a plan warns of: settings that are far from the published advice, or that do not go together."""

from __future__ import annotations

from typing import Any

from steep.data.packing import Corpus
from steep.errors import UserError
from steep.export.gguf_refusals import family_of
from steep.model.machine import Card
from steep.model.positions import unstretched
from steep.model.resolve import ResolvedModel, looks_like_chat
from steep.planning.computation import Computation
from steep.planning.memory import Shape
from steep.schema import FORWARDS, RunConfig
from steep.settings import embedding_rate, planned_epochs, rows_per_step, why_not_summed_in_fp32
from steep.training.adamw8bit import ADAMW_8BIT

# An adapter holds about 2 bits a parameter (Allen-Zhu & Li 2024), and a token of text teaches about 1 bit.
PARAMETERS_PER_TOKEN = 0.5
# English costs about 0.25 tokens a character, Korean in a vocabulary made for it about 0.5.
MANY_TOKENS_PER_CHARACTER = 1.0
# Up to 4 passes a text is worth nearly as much as new one, and next to nothing beyond 16 (Muennighoff et al. 2023).
MANY_EPOCHS = 16
# Tokens. Shorter rows cost little, and a few documents fill them up.
LONG_ROWS = 8192
ADVISED_RATES = (1e-5, 5e-4)
ADVISED_EMBEDDING_RATIO = (2, 20)


def _of_options(config: RunConfig) -> list[str]:
    """What the options of the recipe do not go with."""
    adapter, training, found = config.adapter, config.training, []
    scale = adapter.lora_alpha / (adapter.r**0.5 if adapter.use_rslora else adapter.r)
    at_odds = []
    if adapter.init_lora_weights == "pissa" and scale != 1:
        at_odds.append("PiSSA was published with a scale of 1 (lora_alpha: r, use_rslora: false)")
    rate = training.loraplus_lr_ratio * training.learning_rate
    if training.loraplus_lr_ratio > 1 and rate > ADVISED_RATES[1] and adapter.use_rslora:
        at_odds.append(f"LoRA+ trains B at {rate:g}, and rank-stabilised scaling makes its steps larger once more")
    if at_odds:
        found.append(
            f"the adapters' scale is {scale:g}: {'; '.join(at_odds)}. Lower training.learning_rate if the loss jumps."
        )
    if adapter.use_dora:
        found.append("DoRA reads every weight once more in each forward: at 8B a step took 1.6 times as long.")
    return found


def _of_card(card: Card | None, base: str, compute: str) -> list[str]:
    """What the card has no units for."""
    found = []
    if card is not None and compute == "bf16" and not card.has_bf16:
        found.append(
            f"the {card.name} has no bf16 units (compute capability 8.0 and newer have): it emulates them, at about a "
            "tenth of the speed. Leave model.compute_dtype at auto, which is fp16 there."
        )
    if card is not None and base == "fp8" and not card.has_fp8_units:
        found.append(
            f"the {card.name} has no fp8 units (compute capability 8.9 and newer have): the same weights train there, "
            f"but slower, since each product in {compute} dequantises them first."
        )
    return found


def advice(
    config: RunConfig,
    resolved: ResolvedModel,
    tokenizer: Any,
    corpus: Corpus,
    shape: Shape,
    computation: Computation,
    card: Card | None,
) -> list[str]:
    """What a user should know of the model, the text, the settings and the card before the run."""
    trained_dtype, fused = computation.trained, computation.layers is not None
    found = _of_card(card, computation.base, computation.compute)
    if computation.compute == "fp16" and resolved.config.model_type.startswith("gemma"):
        found.append(
            f"{config.model.name} computes in fp16, which ends at 65,504: models of its family are known to exceed "
            "that. Steps that are not finite are not applied, and three in a row end the run. Take a card with bf16, "
            "or model.compute_dtype: fp32."
        )
    if fused and config.model.attn_implementation != "auto":
        found.append(
            f"model.attn_implementation: {config.model.attn_implementation} is transformers' attention, which a fused "
            "run uses to generate and no more: steep's own computes the steps. model.fused: off trains with it."
        )
    if looks_like_chat(resolved, tokenizer):
        found.append(
            f"{config.model.name} looks like an instruct model: continued pretraining on plain text damages its "
            "chat ability. Use the base model of the same name."
        )
    tokens = corpus.statistics["targets"]
    if shape.lora < tokens * PARAMETERS_PER_TOKEN:
        found.append(
            f"the adapters have {shape.lora:,} parameters for {tokens:,} tokens, fewer than "
            f"{PARAMETERS_PER_TOKEN} a token: they may not hold what the text teaches. Raise adapter.r."
        )
    if not any(source.role == "replay" for source in config.data.sources):
        found.append(
            "no source has the role replay: the model will forget some of what it knows. Add general text in its "
            "old language with role: replay (5 % of the tokens; 25 % is the published advice for a new language)."
        )
    elif config.data.replay_share < 0.25:
        found.append(
            f"replay is {config.data.replay_share:.0%} of the tokens: 5 % are enough for a domain in a language that "
            "the model knows, and 25 % are the published advice for a new language."
        )
    for source in corpus.statistics["sources"]:
        if source["role"] == "train" and 1 / source["characters_per_token"] > MANY_TOKENS_PER_CHARACTER:
            found.append(
                f"the tokenizer spends {1 / source['characters_per_token']:.2f} tokens a character on "
                f"{source['domain']}: rows hold little text. Give it {'more ' if config.model.new_tokens else ''}new "
                "tokens (model.new_tokens), or take a model with a vocabulary for it."
            )
    length, longest = config.data.max_length, int(corpus.train.length.max())
    if length > LONG_ROWS and longest <= length / 2:
        found.append(
            f"rows have {length:,} tokens (data.max_length), and the longest document {longest:,}: the documents of a "
            "row do not see each other, so nothing learns from further back. Shorter rows take less memory, and teach "
            "the same."
        )
    rows = len(corpus.train)
    epochs = planned_epochs(config, rows)
    if (of_step := rows_per_step(config)) > rows:
        names = FORWARDS if config.training.rows_per_step is None else ["rows_per_step"]
        found.append(
            f"a step takes {of_step:,} rows and the text has {rows:,}: each step is a whole pass over it. Lower "
            f"{' or '.join(f'training.{name}' for name in reversed(names))}."
        )
    if epochs > MANY_EPOCHS:
        found.append(
            f"the text is gone through {epochs:,.1f} times: beyond {MANY_EPOCHS} another time teaches next to "
            "nothing (Muennighoff et al. 2023). Lower training.max_steps or training.num_train_epochs, or add text."
        )
    if trained_dtype == "bf16" and config.training.optim not in ADAMW_8BIT:
        found.append(
            f"model.trained_dtype is bf16, and {config.training.optim} rounds most updates of such weights away. Use "
            "optim: adamw_8bit, which rounds stochastically, or trained_dtype: fp32."
        )
    if config.training.grad_accum_dtype == "bf16" and (reason := why_not_summed_in_fp32(config, trained_dtype, fused)):
        found.append(f"training.grad_accum_dtype: bf16 changes nothing: {reason}.")
    if config.training.master_weights != "none" and trained_dtype != "bf16":
        found.append(
            f"training.master_weights: {config.training.master_weights} changes nothing: weights train in "
            f"{trained_dtype}, and need no masters."
        )
    found += _of_options(config)
    if resolved.stretched is not None:
        reach = unstretched(resolved.stretched)
        if reach is not None and config.data.max_length <= reach:
            found.append(
                f"model.rope_scaling is not needed: rows have {config.data.max_length:,} tokens, and the model has "
                f"{reach:,} positions without it, which it was made with. Leave it out, unless the result is to read "
                "longer texts."
            )
        try:
            family_of(resolved.stretched)
        except UserError as error:
            found.append(f"steep export --to gguf will refuse the result, for model.rope_scaling: {error.problem}.")
    rate, ratio = config.training.learning_rate, config.training.learning_rate / max(embedding_rate(config), 1e-30)
    if not ADVISED_RATES[0] <= rate <= ADVISED_RATES[1]:
        found.append(f"learning_rate {rate:g} is far from the advice ({ADVISED_RATES[0]:g} to {ADVISED_RATES[1]:g}).")
    if config.adapter.modules_to_save and not ADVISED_EMBEDDING_RATIO[0] <= ratio <= ADVISED_EMBEDDING_RATIO[1]:
        found.append(
            f"embedding_learning_rate {embedding_rate(config):g} is far from the advice "
            f"(learning_rate / {ADVISED_EMBEDDING_RATIO[0]} to / {ADVISED_EMBEDDING_RATIO[1]})."
        )
    return found
