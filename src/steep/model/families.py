"""The model families that steep computes fused: transformers' classes, each with the fused forward before its own.

A fused class bears the name of the class that it stands for, at the top of this module: pickle finds it here, and
accelerate, FSDP and device maps, which match layers by name, find what they look for.
"""

from __future__ import annotations

from typing import Any

import peft
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from steep.model.decoder import FusedDecoder, FusedLayer
from steep.model.fp8_linear import refuse_merge
from steep.model.loss import FusedCausalLM
from steep.model.read_layer import Traits
from steep.model.walked import Walked

# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false


class LlamaDecoderLayer(FusedLayer, llama.LlamaDecoderLayer):
    pass


class LlamaModel(FusedDecoder, llama.LlamaModel):
    pass


class LlamaForCausalLM(FusedCausalLM, llama.LlamaForCausalLM):
    pass


class MistralDecoderLayer(FusedLayer, mistral.MistralDecoderLayer):
    traits = Traits(window=True)


class MistralModel(FusedDecoder, mistral.MistralModel):
    pass


class MistralForCausalLM(FusedCausalLM, mistral.MistralForCausalLM):
    pass


class Qwen2DecoderLayer(FusedLayer, qwen2.Qwen2DecoderLayer):
    pass


class Qwen2Model(FusedDecoder, qwen2.Qwen2Model):
    pass


class Qwen2ForCausalLM(FusedCausalLM, qwen2.Qwen2ForCausalLM):
    pass


class Qwen3DecoderLayer(FusedLayer, qwen3.Qwen3DecoderLayer):
    pass


class Qwen3Model(FusedDecoder, qwen3.Qwen3Model):
    pass


class Qwen3ForCausalLM(FusedCausalLM, qwen3.Qwen3ForCausalLM):
    pass


class GemmaDecoderLayer(FusedLayer, gemma.GemmaDecoderLayer):
    traits = Traits(unit_offset=True)


class GemmaModel(FusedDecoder, gemma.GemmaModel):
    pass


class GemmaForCausalLM(FusedCausalLM, gemma.GemmaForCausalLM):
    pass


class Gemma2DecoderLayer(FusedLayer, gemma2.Gemma2DecoderLayer):
    traits = Traits(unit_offset=True, norms_added=True, softcap=True)


class Gemma2Model(FusedDecoder, gemma2.Gemma2Model):
    pass


class Gemma2ForCausalLM(FusedCausalLM, gemma2.Gemma2ForCausalLM):
    caps_logits = True


class Gemma3DecoderLayer(FusedLayer, gemma3.Gemma3DecoderLayer):
    traits = Traits(unit_offset=True, norms_added=True)


class Gemma3TextModel(FusedDecoder, gemma3.Gemma3TextModel):
    pass


class Gemma3ForCausalLM(FusedCausalLM, gemma3.Gemma3ForCausalLM):
    caps_logits = True


class InstalledAdapters(Walked):
    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own, of a model that it can merge into."""
        refuse_merge(self)
        return self.base_model.merge_and_unload(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, of a model that it can merge into."""
        refuse_merge(self)
        self.base_model.merge_adapter(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def _get_base_model_class(self, *args: Any, **kwargs: Any) -> type:
        """PEFT saves its name and module with adapters of no task type: who opens them need not have steep."""
        return library_class(super()._get_base_model_class(*args, **kwargs))  # pyright: ignore[reportAttributeAccessIssue]


class PeftModel(InstalledAdapters, peft.PeftModel):
    pass


class PeftModelForCausalLM(InstalledAdapters, peft.PeftModelForCausalLM):
    pass


# Causal LMs, decoders and layers, each behind its family's config; and PEFT's wrappers around them.
FUSED = (
    LlamaForCausalLM, LlamaModel, LlamaDecoderLayer,
    MistralForCausalLM, MistralModel, MistralDecoderLayer,
    Qwen2ForCausalLM, Qwen2Model, Qwen2DecoderLayer,
    Qwen3ForCausalLM, Qwen3Model, Qwen3DecoderLayer,
    GemmaForCausalLM, GemmaModel, GemmaDecoderLayer,
    Gemma2ForCausalLM, Gemma2Model, Gemma2DecoderLayer,
    Gemma3ForCausalLM, Gemma3TextModel, Gemma3DecoderLayer,
    PeftModel, PeftModelForCausalLM,
)  # fmt: skip


def library_class(each: type) -> type:
    """The class of transformers, or of PEFT, that a fused class stands for; any other is its own."""
    return each.__bases__[1] if each in FUSED else each


def fused_class(each: type) -> Any:
    """The fused class that stands for one of transformers or of PEFT, or is it; None: there is none."""
    return next((fused for fused in FUSED if library_class(fused) is library_class(each)), None)
