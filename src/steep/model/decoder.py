"""The fused forward of a decoder and of its layers, as mixins before transformers' own classes.

A call that they do not compute goes to the library's forward: quietly one with a key-value cache (generate), and with
one line that names the reason any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from steep.errors import UserError
from steep.model.attention_bytes import AttentionForm
from steep.model.block import block
from steep.model.fp8_linear import Fp8Linear
from steep.model.fused import Fused
from steep.model.host_store import HostLayer, left_in_an_error
from steep.model.layer import Batch, Groups, Layer
from steep.model.machine import has_fp8_units
from steep.model.projections import Unfused, compute_dtype, hooks_of, in_use
from steep.model.read_layer import Traits, eps_of
from steep.model.recompute import levels_within
from steep.model.refusals import refuse_arguments, refuse_config, refuse_decoder, refuse_hooks_of_layer, row_lengths
from steep.model.tiling import tile_sizes
from steep.ops.backend import gradient_dtype, not_compiled
from steep.ops.embedding import embedding
from steep.ops.fp8_groups import Fp8Products
from steep.ops.packing import Packing
from steep.ops.rms_norm import rms_norm


class FusedLayer(nn.Module):
    """A decoder layer that computes as one block where it is given a `batch` (and then its model's `fused`, and its
    own tensors where they are read already)."""

    traits = Traits()
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """transformers ≥ 5.23 wraps a layer's forward in its gradient checkpointing here; this one has its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)  # past transformers 5.17's gradient checkpointing

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        batch: Batch | None = None,
        fused: Fused | None = None,
        layer: Layer | None = None,
        **kwargs: Any,
    ) -> Any:
        if batch is not None and fused is not None:
            layer, trains = layer or fused.layer(self), self.training and torch.is_grad_enabled()
            backend = fused.backends.backend(layer.attention, batch.packing, batch.dtype, trains=trains)
            return block(hidden_states, layer, batch, backend)
        library = super().forward
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(lambda given: library(given, *args, **kwargs), hidden_states)
        return library(hidden_states, *args, **kwargs)


def caches_given(past_key_values: Any, cache: Any) -> dict[str, Any]:
    """A key-value cache under the name that it was given by: transformers 5.24 has another for it, and warns of the old
    one."""
    given = {"past_key_values": past_key_values, "cache": cache}
    return {name: value for name, value in given.items() if value is not None}


class FusedDecoder(nn.Module):
    """A decoder whose layers are `FusedLayer`s."""

    fused: Fused
    config: Any
    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    _can_record_outputs: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        document_lengths: Sequence[int] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments, and its output.

        Args:
            cache: what transformers >= 5.24 calls `past_key_values`.
            document_lengths: tokens of each document, row after row, as `position_ids` have them: without it the host
                reads those back, and so waits for all that the GPU has to do.

        Raises:
            UserError: a key-value cache in training, or a replica of `nn.DataParallel`.
            ValueError: `document_lengths` without `position_ids`, or of another number of tokens.
        """
        if getattr(self, "_is_replica", False):
            raise UserError(
                "model",
                "nn.DataParallel copies it for each card, and a fused model is computed by its own modules",
                "Start one process for each card (torchrun), or uninstall the fused forward.",
            )
        if document_lengths is not None and position_ids is None:
            raise ValueError("document_lengths need position_ids, which begin with 0 at each document")
        caches = caches_given(past_key_values, cache)
        if "fused" in self.__dict__ and not self._wants_cache(bool(caches), use_cache):
            use_cache = False
            try:
                refuse_config(self.config, self.layers)
                refuse_arguments(self.config, kwargs)
                if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
                    raise Unfused("cu_seq_lens_q came without position_ids")
                given = input_ids, attention_mask, position_ids, inputs_embeds, document_lengths
                output = BaseModelOutputWithPast(last_hidden_state=self._fused_forward(*given))  # pyright: ignore[reportArgumentType]
                wants_tuple = kwargs.get("return_dict", self.config.return_dict) is False
                return output.to_tuple() if wants_tuple else output
            except Unfused as reason:
                self.fused.was_fused = False
                self.fused.say_once(str(reason))
                self.fused.forget_changed()
        # transformers records hidden states and attentions of classes that have entered themselves by name: each does
        # so when it makes an instance, and this one was set on one.
        _CAN_RECORD_REGISTRY.update({str(type(self)): self._can_record_outputs})  # pyright: ignore[reportArgumentType]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **caches,
            **kwargs,
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """`to` and its like: parameters get other memory, and what was read would hold the old."""
        if "fused" in self.__dict__:  # it has none while it is made
            self.fused.forget()
        return super()._apply(*args, **kwargs)

    def _wants_cache(self, has_cache: bool, use_cache: bool | None) -> bool:
        trains = self.training and torch.is_grad_enabled()
        if trains and (has_cache or use_cache):
            raise UserError(
                "use_cache", "a key-value cache in training lets documents see each other", "Pass use_cache=False."
            )
        if has_cache or trains:
            return has_cache
        return bool(self.config.use_cache if use_cache is None else use_cache)

    @not_compiled
    def _fused_forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        document_lengths: Sequence[int] | None,
    ) -> torch.Tensor:
        """The last hidden states [B, L, H] in the residual stream's dtype, zero where a row is padded."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        refuse_decoder(self)
        embedded = (
            inputs_embeds if input_ids is None else looked_up(self.embed_tokens, input_ids, self.fused.row_gradients)
        )
        assert embedded is not None
        shape, device = embedded.shape[:2], embedded.device
        if not shape.numel():
            given = "inputs_embeds" if input_ids is None else "input_ids"
            raise UserError(
                given, f"a batch of {shape[0]} rows of {shape[1]} tokens is empty", "Give one token or more."
            )
        lengths = row_lengths(attention_mask, position_ids, shape)
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=device)[None]
            document_lengths = [shape[1]] * shape[0]
        positions = position_ids.expand(shape)
        hidden_states, valid = embedded.flatten(0, 1), None
        if hidden_states.stride(-1) != 1:
            hidden_states = hidden_states.contiguous()
        packing = _packing(positions, document_lengths) if lengths is None else Packing.from_lengths(lengths, device)
        if packing.num_tokens < len(hidden_states) and lengths is not None:
            valid = torch.cat([torch.arange(n) + row * shape[1] for row, n in enumerate(lengths)]).to(device)
            hidden_states = hidden_states[valid]
        inputs = [hidden_states]
        del embedded, hidden_states  # what the first layer has of it may be in host memory alone
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
            hidden_states = self._layers(inputs, positions, valid, packing)
        if valid is not None:
            padded = hidden_states.new_zeros(shape.numel(), hidden_states.shape[1])
            hidden_states = padded.index_copy(0, valid, hidden_states)
        self.fused.calls += 1
        self.fused.was_fused = True
        return hidden_states.view(*shape, -1)

    def _layers(
        self, inputs: list[torch.Tensor], positions: torch.Tensor, valid: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        """Hidden states [T, H], before the layers to behind them; the list is emptied, so nobody else holds those."""
        hidden_states = inputs.pop()
        plain = all(isinstance(layer, FusedLayer) and not layer._forward_pre_hooks for layer in self.layers)
        layers = self._read(plain)
        dtype = compute_dtype(self.layers[0].mlp.down_proj, hidden_states)
        kinds = [getattr(layer.self_attn, "layer_type", None) for layer in self.layers]
        if kinds[0] is not None and kinds != list(self.config.layer_types)[: len(kinds)]:
            raise Unfused("config.layer_types are not those of its layers")
        turns = {kind: self._turns(positions, kind, valid) for kind in set(kinds)}
        fp8 = self._fp8()
        if fp8 != "none" and not self.fused.calls:
            layers = list(layers)
            self._say_dequantised([layer for layer in layers if layer is not None], dtype)
        levels: Sequence[int | None] = [None] * len(kinds)
        hosts: Sequence[HostLayer | None] = [None] * len(kinds)
        if torch.is_grad_enabled():
            levels = self._levels(hidden_states, dtype, positions.shape[1])
            hosts = self.fused.host_layers(len(kinds), hidden_states.device)
        tile = self.fused.tile or tile_sizes(packing.num_tokens)[0]
        with left_in_an_error(hosts[-1]):
            for module, layer, kind, level, host in zip(self.layers, layers, kinds, levels, hosts, strict=True):
                batch = Batch(packing, *turns[kind], dtype, fp8, level, tile, host, takes_dy=plain)
                hidden_states = module(hidden_states, batch=batch, fused=self.fused, layer=layer)
            if hosts[-1] is not None:
                hosts[-1].let_go()
        traits = self.layers[0].traits
        with torch.autocast(hidden_states.device.type, enabled=False):
            return rms_norm(hidden_states, self.norm.weight, eps_of(self.norm), unit_offset=traits.unit_offset)

    def _read(self, plain: bool) -> Iterable[Layer | None]:
        """Every layer: the first now, each other when its turn has come, so that the GPU has work while it is read. But
        all now where the last call was not fused, or where calling a layer does more than to compute it: what refuses a
        layer would find others computed in vain, or called already.

        Args:
            plain: a layer's output goes to the next one alone, and its gradient comes from there: FSDP has hooks.
        """
        read = (self._read_one(number, layer) for number, layer in enumerate(self.layers))
        return chain([next(read)], read) if plain and self.fused.was_fused else list(read)

    def _read_one(self, number: int, layer: Any) -> Layer | None:
        """None: its tensors are other ones when it is called (FSDP gathers them then)."""
        known = None
        if isinstance(layer, FusedLayer):
            refuse_hooks_of_layer(layer, f"layer {number}")
            known = self.fused.layer(layer)
        elif not type(layer).__module__.startswith("torch.distributed"):  # FSDP's wrapper, which reads when called
            raise Unfused(f"layer {number} is a {type(layer).__name__}")
        return None if layer._forward_pre_hooks else known

    def _turns(
        self, positions: torch.Tensor, kind: str | None, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, fp32 [T, R / 2], of the layers of one kind: the model's own, which knows of scaled forms. Some
        of those go by the longest row, its padding included.

        Args:
            positions: [B, L].
            valid: which of those B L are computed; None: all.
        """
        like = torch.empty(0, dtype=torch.float32, device=positions.device)  # cos and sin come in its dtype
        by_kind = {"layer_type": kind} if hasattr(self.rotary_emb, "layer_types") else {}
        cos, sin = self.rotary_emb(like, position_ids=positions.reshape(1, -1), **by_kind)
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half], sin[0, :, :half]
        return (cos.contiguous(), sin.contiguous()) if valid is None else (cos[valid], sin[valid])

    def _fp8(self) -> Fp8Products:
        fused = self.fused
        if fused.fp8 is None:
            stored = any(isinstance(module, Fp8Linear) for layer in self.layers for module in layer.modules())
            fused.fp8 = "both" if stored and has_fp8_units(self.norm.weight.device) else "none"
        return fused.fp8

    def _say_dequantised(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        """Products in fp8 are wanted: say of which groups they are not."""
        reasons = [each for each in (layer.why_dequantised(dtype) for layer in layers) if each]
        if reasons:
            groups = f"{sum(map(len, reasons))} of the {len(Groups._fields) * len(layers)} groups of products"
            where = f"in {len(reasons)} of {len(layers)} layers"
            self.fused.say_once(f"{groups}, {where}, are not in fp8: {reasons[0][0]}", fused=True)

    def _levels(self, hidden_states: torch.Tensor, dtype: torch.dtype, row: int) -> list[int]:
        fused, tokens = self.fused, len(hidden_states)
        fused.last = tokens, dtype, hidden_states.dtype, row
        if fused.levels is None:
            fused.measure(self)  # later, states of the optimizer would be counted twice
        if fused.levels is None or 0 < fused.chosen_for < tokens:
            layer, stream = fused.layer(self.layers[0]), hidden_states.dtype
            form = AttentionForm.here(layer, dtype, row, hidden_states.device)
            room, host_room, beside, fp8 = fused.room, fused.host_room, fused.beside, self._fp8()
            fused.levels, fused.places, fused.tile = levels_within(
                room, host_room, len(self.layers), layer, dtype, stream, tokens, beside, fp8, form
            )
            fused.chosen_for = tokens
        return fused.levels


def looked_up(module: Any, input_ids: torch.Tensor, by_rows: int = 0) -> torch.Tensor:
    """The embeddings of `input_ids`: the module's own, but with a gradient in what autograd keeps of the table's, and
    of these rows alone where it is wanted `by_rows` (`steep.ops.embedding`)."""
    table = in_use(module)
    scale = getattr(table, "embed_scale", None)  # Gemma's own class multiplies by it
    known = type(table) is nn.Embedding or (isinstance(table, nn.Embedding) and scale is not None)
    hooked = any(any(hooks_of(part)) or "forward" in part.__dict__ for part in (module, table))
    if not known or hooked or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return module(input_ids)
    if not by_rows and gradient_dtype(table.weight) == table.weight.dtype:
        return module(input_ids)
    rows = embedding(table.weight, input_ids, table.padding_idx, by_rows)
    return rows if scale is None else rows * scale.to(rows.dtype)


def _packing(positions: torch.Tensor, document_lengths: Sequence[int] | None) -> Packing:
    if document_lengths is not None:
        if sum(document_lengths) != positions.numel():
            raise ValueError(f"document_lengths have {sum(document_lengths)} tokens, and the batch {positions.numel()}")
        return Packing.from_lengths(document_lengths, positions.device)
    try:
        return Packing.from_positions(positions)
    except ValueError as error:  # it names a row and a token, and one line is said for all of them
        raise Unfused("its position ids do not start at 0 with each document and count up by 1 inside it") from error
