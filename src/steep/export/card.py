"""The model card: what a result is, what it learned from, how good it is, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from steep.export.base_weights import Kind
from steep.export.gate import BITS_LIMIT
from steep.export.loading_code import LOFTQ_OVER_FP8, is_loftq_over_fp8, loading_by_steep, loading_code
from steep.export.markdown import code, inline, python, shell
from steep.export.story import Base, Gated, Story


def write_card(
    folder: Path,
    base: Base,
    story: Story,
    *,
    form: str,
    gated: Gated | None,
    name: str,
    vocabulary_grew: bool = False,
    checks: Mapping[str, str] | None = None,
    misread_by_converter: bool = False,
) -> None:
    """Write `README.md` into `folder`.

    Args:
        form: ``merged``, ``adapter`` or ``gguf``.
        name: what the result is called: USER/NAME on the hub, else its folder's name.
        vocabulary_grew: whether the base has to be resized before the adapter opens.
        checks: what was found of each GGUF file, by its name.
        misread_by_converter: whether llama.cpp's converter is wrong for the merged folder.
    """
    hub_texts = [source["hub"] for source in story.settings["data"]["sources"] if source.get("hub")]
    data = ModelCardData(
        base_model=base.name if base.on_hub else None,
        library_name={"merged": "transformers", "adapter": "peft"}.get(form),
        pipeline_tag="text-generation",
        tags=[
            "continued-pretraining",
            "steep",
            *(["lora"] if form == "adapter" else ["gguf"] if form == "gguf" else []),
        ],
        datasets=sorted(set(hub_texts)) or None,
        **base.licence,
    )
    parts = [
        f"# {inline(name.rsplit('/', 1)[-1])}",
        _what_it_is(base, story, form),
        _how_to_open(base, story, form, name, vocabulary_grew),
        *([CONVERTER_NOTE] if misread_by_converter else []),
        *([_gate(gated, base, story)] if gated else []),
        *([_gguf(checks)] if checks else []),
        _figures(story),
        _recipe(story),
        _data(story),
        _ledger(story),
        _versions(story),
    ]
    body = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


def _what_it_is(base: Base, story: Story, form: str) -> str:
    adapter = story.settings["adapter"]
    revision = f" (revision {inline(base.revision)})" if base.revision else ""
    shown = f"[{inline(base.name)}](https://huggingface.co/{quote(base.name)})" if base.on_hub else code(base.name)
    embeddings = ", its embeddings trained with it" if adapter["modules_to_save"] else ""
    what = {
        "merged": "The adapter is merged: this folder is a whole model.",
        "adapter": "This folder is the adapter; it needs the base model.",
        "gguf": "The adapter is merged: each file is a whole model.",
    }[form]
    text = (
        f"{shown}{revision}, its pretraining continued with `steep`: LoRA of rank {adapter['r']} on the linear layers"
        f"{embeddings}. {what}"
    )
    if base.stored and form != "adapter":
        how = "converted" if base.stored == "GGUF" else "dequantised"
        text += f"\n\nThe base model was given as {base.stored}: its weights were {how} to 16 bits."
    return text


def _how_to_open(base: Base, story: Story, form: str, name: str, vocabulary_grew: bool) -> str:
    if form == "gguf":
        return f"## Use\n\n```bash\nollama create {shell(name.rsplit('/', 1)[-1])} -f Modelfile\n```"
    if form == "merged":
        return (
            "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({python(name)}, device_map="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({python(name)})\n```\n\n"
            f"vLLM: {code(f'vllm serve {shell(name)}')}."
        )
    resize = "base.resize_token_embeddings(len(tokenizer), mean_resizing=False)\n" if vocabulary_grew else ""
    notes = [
        *([] if story.settings["adapter"]["modules_to_save"] else [_FOLDED]),
        *adapter_notes(replace(base, name=inline(base.name)), story),
    ]
    return (
        f"## Use\n\n```python\n{_load_base(base, story)}"
        f"tokenizer = AutoTokenizer.from_pretrained({python(name)})\n"
        f"{resize}model = PeftModel.from_pretrained(base, {python(name)})\n```"
        + "".join(f"\n\n{note}" for note in notes)
    )


def _load_base(base: Base, story: Story) -> str:
    plan = story.plan
    if base.stored == "GGUF" or _is_loftq_over_fp8(base, story):  # transformers quantises no GGUF file that it opens
        scaling = story.settings["model"].get("rope_scaling")
        return (
            "import steep\nfrom peft import PeftModel\nfrom transformers import AutoTokenizer\n\n"
            f"{loading_by_steep(base.name, plan['base'], plan['compute_dtype'], base.revision, scaling)}"
        )
    code_of = loading_code(plan["base"], plan["compute_dtype"], base.stored_by, base.stretched)
    revision = f", revision={python(base.revision)}" if base.revision else ""
    classes = ", ".join(["AutoModelForCausalLM", "AutoTokenizer", *code_of.classes])
    return (
        f"import torch\nfrom peft import PeftModel\nfrom transformers import {classes}\n\n"
        f"{code_of.quantization}base = AutoModelForCausalLM.from_pretrained({python(base.name)}, {code_of.settings}"
        f'{revision}, device_map="auto")\n'
    )


def _is_loftq_over_fp8(base: Base, story: Story) -> bool:
    return is_loftq_over_fp8(story.plan["base"], base.stored_by, story.settings["adapter"]["init_lora_weights"])


CONVERTER_NOTE = (
    "For GGUF files use steep export RUN --to gguf, where steep can write them, and not llama.cpp's "
    "convert_hf_to_gguf.py: this folder has a SentencePiece tokenizer without tokenizer.model. That converter then "
    "gives every piece one score, and most text is cut otherwise."
)
_FOLDED = (
    "The scale of each layer is folded into its `lora_B`, and lower ranks are filled up with zeros, so that alpha is r "
    "here and readers that know no other scale read it right."
)


def adapter_notes(base: Base, story: Story) -> list[str]:
    """What whoever gets an adapter needs to know: who refuses it, and where its base is."""
    adapter = story.settings["adapter"]
    refused = [
        *(["trained embeddings"] if adapter["modules_to_save"] else []),
        *(["DoRA"] if adapter["use_dora"] else []),
    ]
    notes = []
    if base.stretched is not None:
        notes.append(
            "It was trained with scaled rotary positions, which the lines of its card set. Over the base with the "
            "positions of its own config it computes something else."
        )
    if refused:
        notes.append(
            f"vLLM and llama.cpp refuse adapters with {' and '.join(refused)}. For them merge: steep export RUN "
            "--to merged."
        )
    if _is_loftq_over_fp8(base, story):
        notes.append(LOFTQ_OVER_FP8)
    if not base.on_hub:
        notes.append(
            f"The base model, {base.name}, was a local one: the adapter names it without its place. Whoever opens the "
            "adapter loads their own copy of it, as `base`; `AutoPeftModelForCausalLM` cannot find it."
        )
    return notes


def original_name(base: Base) -> str:
    """What the run's quantised weights, if any, were made of."""
    return "the 16-bit copy of the GGUF file" if base.stored == "GGUF" else "the 16-bit original"


def _kind_name(kind: Kind, base: Base) -> str:
    return original_name(base) if kind == "original" else "the dequantised base that it was trained over"


def _gate(gated: Gated, base: Base, story: Story) -> str:
    merged = {score.domain: score for score in gated.merged.scores}
    rows = [
        (
            score.domain,
            f"{score.bits_per_byte:.4f}",
            f"{merged[score.domain].bits_per_byte:.4f}",
            f"{gated.gap.bits_per_byte[score.domain]:+.4f}",
        )
        for score in gated.adapter.scores
    ]
    lines = [
        "## Round trip",
        f"The adapter is merged into {_kind_name(gated.kind, base)}. Each weight was read back and is that of the "
        "adapter over this base, rounded once. The model was opened again by plain transformers and compared with the "
        f"adapter over the base of the run, on {gated.text}:",
        _table(("domain", "adapter, bits per byte", "merged", "gap"), rows),
        f"Relative RMS of the difference of logits: {gated.gap.logits:.4f}.",
    ]
    if story.plan["base"] == "int8":
        lines.append("Over int8 the adapter's activations are rounded to 8 bits too; the merged model's are not.")
    if story.plan.get("fp8_products") == "both":
        lines.append(_without_fp8(gated))
    if not gated.exact and gated.gap.rise > BITS_LIMIT:
        lines.append(
            f"**The merged model is worse than the trained one by up to {gated.gap.rise:.4f} bits per byte.** The "
            "adapter has learned to correct the quantisation that it was trained over, and "
            f"{original_name(base)} has none of it."
        )
    if gated.other is not None:
        other: Kind = "original" if gated.kind == "dequantised" else "dequantised"
        lines.append(
            f"Merged into {_kind_name(other, base)} the largest rise would be {gated.other.rise:+.4f} bits per byte."
        )
    return "\n\n".join(lines)


def _without_fp8(gated: Gated) -> str:
    text = "The adapter was trained with products in fp8, which round activations to 8 bits. Here it has none of them"
    if gated.own is None:
        return f"{text}."
    exact = {score.domain: score.bits_per_byte for score in gated.adapter.scores}
    own = [
        f"{inline(score.domain)} {score.bits_per_byte:.4f} ({score.bits_per_byte - exact[score.domain]:+.4f})"
        for score in gated.own
    ]
    return f"{text}; with them its bits per byte are: {', '.join(own)}."


def _gguf(checks: Mapping[str, str]) -> str:
    return f"## The GGUF files against the merged model\n\n{_table(('file', 'found'), list(checks.items()))}"


def _figures(story: Story) -> str:
    if not story.before:
        return ""
    after = {score.domain: score for score in story.after}
    rows = [
        (
            score.domain,
            story.roles.get(score.domain, ""),
            f"{score.bits_per_byte:.3f}",
            f"{after[score.domain].bits_per_byte:.3f}",
            f"{score.perplexity:.2f}",
            f"{after[score.domain].perplexity:.2f}",
            f"{score.tokens:,}",
        )
        for score in story.before
    ]
    head = ("domain", "role", "bits per byte before", "after", "perplexity before", "after", "tokens scored")
    note = f"\n\n{story.scored_otherwise}" if story.scored_otherwise else ""
    return f"## Held-out text before and after\n\n{_table(head, rows)}{note}"


_PISSA = "r trained, and r that take their beginning out of the base again, so that it stays the stock one"


def _recipe(story: Story) -> str:
    plan, adapter, training = story.plan, story.settings["adapter"], story.settings["training"]
    scaling = "rank-stabilised" if adapter["use_rslora"] else "alpha / r"
    rows = [
        ("frozen weights", f"{plan['base']}, computed in {plan['compute_dtype']}"),
        ("adapter", f"r {adapter['r']}, alpha {adapter['lora_alpha']:g}, {scaling}"),
        *_options(story),
        ("trained whole", ", ".join(adapter["modules_to_save"]) or "nothing"),
        ("parameters trained", f"{plan['parameters']['trained']:,} in {plan['trained_dtype']}"),
        ("learning rate", f"{plan['learning_rate']:g}, embeddings {plan['embedding_learning_rate']:g}"),
        ("schedule", f"{training['lr_scheduler_type']}, {plan['steps']:,} steps of {plan['rows_per_step']} rows"),
        ("rows", f"{plan['data']['max_length']} tokens, {plan['epochs']:.2f} epochs"),
        ("optimizer", training["optim"]),
    ]
    return f"## Recipe\n\n{_table(('', ''), rows)}"


def _options(story: Story) -> list[tuple[str, str]]:
    """What the run set beyond the plain recipe."""
    settings = story.settings
    model, adapter, training = settings["model"], settings["adapter"], settings["training"]
    replays = any(source["role"] == "replay" for source in story.plan["data"]["sources"])
    given = [
        ("adapters begin at", adapter["init_lora_weights"] if adapter["init_lora_weights"] is not True else None),
        ("rank as saved", f"{2 * adapter['r']}: {_PISSA}" if adapter["init_lora_weights"] == "pissa" else None),
        ("DoRA", "yes" if adapter["use_dora"] else None),
        ("dropout", f"{adapter['lora_dropout']:g}" if adapter["lora_dropout"] else None),
        ("LoRA+ ratio", f"{training['loraplus_lr_ratio']:g}" if training["loraplus_lr_ratio"] != 1 else None),
        ("new tokens", "yes, the tokenizer here has them" if model["new_tokens"] is not None else None),
        ("head", "untied from embed_tokens" if model["untie_embeddings"] else None),
        ("replay", f"{settings['data']['replay_share']:.0%} of the tokens" if replays else None),
        ("seed", str(training["seed"])),
    ]
    return [(name, value) for name, value in given if value is not None]


def _data(story: Story) -> str:
    """Hub data sets by their names, files without their folders."""
    given = story.settings["data"]["sources"]
    rows = [
        (
            setting.get("hub") or source["name"],
            source["domain"],
            source["role"],
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
        )
        for source, setting in zip(story.plan["data"]["sources"], given, strict=True)
    ]
    return f"## Text\n\n{_table(('source', 'domain', 'role', 'documents', 'tokens'), rows)}"


def _ledger(story: Story) -> str:
    ledger = story.ledger
    verdict = "All sums agree." if ledger["adds_up"] else f"They do not agree: {inline('; '.join(ledger['problems']))}."
    return (
        f"## Ledger\n\nOf {ledger['targets']:,} targets an epoch {ledger['targets_reached']:,} were trained at least "
        f"once, {ledger['targets_trained']:,} in all ({ledger['epochs']:.2f} epochs), in {ledger['rows_trained']:,} "
        f"rows; {ledger['rows_refused']:,} rows were in steps that were not applied. {verdict}"
    )


def _versions(story: Story) -> str:
    environment = story.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    card = ", ".join(environment["gpus"]) or "a CPU"
    line = f"Trained on {card} with Python {environment['python']}, {packages}."
    return f"## Versions\n\n{inline(line)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(inline, line))} |" for line in lines)
