"""`final/README.md`: how plain PEFT opens the result, in lines that can be run as they stand."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from peft import PeftModel

from steep.export.loading_code import LOFTQ_OVER_FP8, is_loftq_over_fp8, loading_by_steep, loading_code
from steep.export.markdown import code, python
from steep.model.rope import rope_of_far_tokens
from steep.plan import Plan


def write_readme(folder: Path, plan: Plan, model: PeftModel, final: Path) -> None:
    """Write `README.md` into `folder`, in place of PEFT's empty model card.

    Args:
        final: where the folder will stand.
    """
    (folder / "README.md").write_text(readme(plan, model, final), encoding="utf-8")


def readme(plan: Plan, model: PeftModel, final: Path) -> str:
    """The text of `final/README.md`."""
    adapter = model.peft_config["default"]
    base, revision, place = str(adapter.base_model_name_or_path), plan.config.model.revision, python(str(final))
    stored_by, start = plan.resolved.stored_by, plan.config.adapter.init_lora_weights
    grown = plan.shape.vocabulary > plan.resolved.config.get_text_config().vocab_size
    resize = f"base.resize_token_embeddings({plan.shape.vocabulary}, mean_resizing=False)\n" if grown else ""
    code_of = loading_code(plan.base, plan.compute, stored_by, plan.resolved.stretched)
    packages, ways = code_of.packages, []
    if is_loftq_over_fp8(plan.base, stored_by, start):
        packages = ["steep"]
        load = loading_by_steep(base, plan.base, plan.compute, revision, plan.config.model.rope_scaling)
        ways.append(_BY_STEEP.format(note=LOFTQ_OVER_FP8, load=load, resize=resize, final=place))
    else:
        pinned = f", revision={python(revision)}" if revision else ""
        lines = {"quantization": code_of.quantization, "settings": code_of.settings, "final": place}
        # PEFT reads the base's revision there. And it gives the base a row for each token that the tokenizer counts, of
        # which transformers' reader of GGUF files adds one that no embedding has.
        if adapter.revision == revision and len(plan.tokenizer) <= plan.shape.vocabulary:
            imports = "".join(f"from transformers import {name}\n" for name in code_of.classes)
            ways.append(_AUTO.format(imports=imports, **lines))
        classes = ", ".join(["AutoModelForCausalLM", *code_of.classes])
        ways.append(_BY_HAND.format(classes=classes, base=python(base), pinned=pinned, resize=resize, **lines))
    needs = [code(package) for package in ("peft", "transformers", *packages)]
    head = yaml.safe_dump({"base_model": base}, allow_unicode=True, width=math.inf)
    needed = f"{', '.join(needs[:-1])} and {needs[-1]}"
    parts = [_HEAD.format(head=head, base=code(base), needed=needed), _TOKENIZER.format(final=place), *ways]
    if (stretched := plan.resolved.stretched) is not None:
        scaled = rope_of_far_tokens(stretched.get_text_config())
        assert scaled is not None
        parts.append(_SCALED.format(kind=scaled["rope_type"]))
    if plan.vocabulary is not None:
        parts.append(_NEW_TOKENS.format(count=len(plan.vocabulary.tokens)))
    return "\n".join(parts)


_HEAD = """---
{head}library_name: peft
pipeline_tag: text-generation
---

# The result of a run

A PEFT adapter and trained embeddings over {base}, made by steep. The lines below need
{needed}.
"""

_TOKENIZER = """## The tokenizer

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({final})
```
"""

_AUTO = """## In one go

```python
import torch
from peft import AutoPeftModelForCausalLM
{imports}
{quantization}model = AutoPeftModelForCausalLM.from_pretrained({final}, {settings})
```
"""

_BY_HAND = """## Over a base that you load

```python
import torch
from peft import PeftModel
from transformers import {classes}

{quantization}base = AutoModelForCausalLM.from_pretrained({base}, {settings}{pinned})
{resize}model = PeftModel.from_pretrained(base, {final})
```
"""

_BY_STEEP = """## Over the base that it was trained over

{note}

```python
import steep
from peft import PeftModel

{load}{resize}model = PeftModel.from_pretrained(base, {final})
```
"""

_SCALED = """## Positions

The run trained with scaled rotary positions ({kind}), which the lines above set. Over the base with the positions of
its own config the adapter computes something else.
"""

_NEW_TOKENS = """## New tokens

The tokenizer here has {count:,} tokens more than the base's, and the embeddings here have their rows. Opened in either
way, the base has no rows of its own for them: with the adapter switched off they are noise, and texts for the base are
to be read with the base's tokenizer.
"""
