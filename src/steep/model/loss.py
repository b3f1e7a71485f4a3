"""The fused forward of a causal LM: hidden states straight to the loss, without the logits of a batch."""

from __future__ import annotations

from typing import Any, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from steep.model.decoder import caches_given
from steep.model.fused import Fused
from steep.model.original_module import OriginalHead
from steep.model.projections import Unfused, compute_dtype, in_use, refuse_hooks
from steep.model.recompute import bytes_beside_decoder
from steep.model.refusals import library_class_of, refuse_patch
from steep.model.step_bytes import loss_bytes, whole_logits_bytes
from steep.model.walked import Walked
from steep.ops.backend import gradient_dtype
from steep.ops.linear_cross_entropy import Way, linear_cross_entropy

IGNORED = -100
_OF_PADDING = (
    "labels that padded places would predict are left out of the loss, which is too small where num_items_in_batch "
    "counts them, as Trainer's does: give them -100"
)


class FusedCausalLM(Walked):
    """A causal LM whose decoder is a `FusedDecoder`: given labels it gives a loss, and no logits unless asked to.

    Attributes:
        caps_logits: its family caps them by the config's `final_logit_softcapping`, which others may hold for nothing.
    """

    caps_logits = False
    fused: Fused
    config: Any
    model: Any
    lm_head: Any
    loss_function: Any

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments (Trainer reads their names: one with "label" in it is taken for a column of labels),
        and its output, in which `logits` is None where there are labels.

        Args:
            labels: [B, L], not shifted. The loss is the mean over those that are not `ignore_index`, or their sum over
                `num_items_in_batch`.
            cache: what transformers >= 5.24 calls `past_key_values`.
            **kwargs: also `shift_labels` [B, L], shifted already, in place of `labels`.

        Raises:
            ValueError: labels of another shape or dtype.
        """
        shift_labels: torch.Tensor | None = kwargs.pop("shift_labels", None)
        learns = labels is not None or shift_labels is not None
        caches = caches_given(past_key_values, cache)
        if learns and not caches and use_cache is None:
            use_cache = False  # nothing is generated, and documents would see each other
        kwargs |= caches | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        installed = "fused" in self.__dict__  # not in one that `type(model)(config)` made
        head = self._head_of_the_loss() if learns and installed else None
        if installed and torch.is_grad_enabled():
            self._count_head(head, input_ids if inputs_embeds is None else inputs_embeds)
        if head is None:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            if ignore_index != IGNORED:
                kwargs["ignore_index"] = ignore_index
            return super().forward(logits_to_keep=logits_to_keep, return_dict=return_dict, **kwargs)
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        computed = self._computed_rows(shift_labels, attention_mask, ignore_index)
        calls = self.fused.calls
        outputs = self.model(**kwargs, return_dict=True)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        hidden_states, is_fused = outputs.last_hidden_state, self.fused.calls > calls
        del outputs  # hidden states that are converted below need not live until the loss is made
        if not (self.training or torch.is_grad_enabled() or self.fused.logits):
            self.fused.say_once(
                "a call with labels gives no logits (install(model, logits=True) does, for compute_metrics)", fused=True
            )
        softcap = self.config.final_logit_softcapping if self.caps_logits else None
        logits = self._logits(hidden_states, softcap) if self.fused.logits else None
        if shift_labels.shape != hidden_states.shape[:2] or shift_labels.dtype != torch.int64:
            raise ValueError(
                f"labels are int64, one for each of the tokens {list(hidden_states.shape[:2])}, also with "
                f"logits_to_keep, and these are {shift_labels.dtype}, {list(shift_labels.shape)}"
            )
        hidden_states, shift_labels = hidden_states.flatten(0, 1), shift_labels.to(hidden_states.device).flatten()
        if computed is not None and is_fused:  # the others have no hidden states
            rows, labels_left_out = computed[0].to(hidden_states.device), computed[1]
            hidden_states, shift_labels = hidden_states.index_select(0, rows), shift_labels.index_select(0, rows)
            if labels_left_out:
                self.fused.say_once(_OF_PADDING, fused=True)
        _check_labels(shift_labels, len(head), ignore_index)
        hidden_states = hidden_states.to(self._dtype_of_products(hidden_states, is_fused))
        loss = linear_cross_entropy(
            hidden_states,
            head,
            shift_labels,
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            softcap=softcap,
            way=self.fused.loss_way,
        )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **others)  # pyright: ignore[reportArgumentType]
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _dtype_of_products(self, hidden_states: torch.Tensor, is_fused: bool) -> torch.dtype:
        """Of the head: that of the layers, or after the library's forward what the library would take."""
        if is_fused:
            return compute_dtype(self.model.layers[0].mlp.down_proj, hidden_states)
        device = hidden_states.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype

    def _computed_rows(
        self, labels: torch.Tensor, attention_mask: Any, ignore_index: int
    ) -> tuple[torch.Tensor, bool] | None:
        """Which of all places [B · L] are no padding, as indices; and whether others have labels, until that was said.
        Looked for before the decoder is called: it waits for the GPU then, to read the mask."""
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != labels.shape:
            return None
        mask = attention_mask.to(labels.device).bool()
        computed = mask.flatten().nonzero().flatten()
        if len(computed) == mask.numel():
            return None
        is_told = _OF_PADDING in self.fused.said
        return computed, not is_told and bool((~mask & (labels != ignore_index)).any())

    def _count_head(self, head: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
        """Note what is taken beside the decoder, for its choice of levels: by the head as it trains, and by the loss.

        Args:
            head: the weight of the fused loss, over 16-bit hidden states; None: the logits of the batch exist whole.
        """
        tokens = 0 if inputs is None else inputs.shape[:2].numel()
        if tokens <= self.fused.beside_for:
            return
        if head is None:
            of_loss = whole_logits_bytes(tokens, self.config.vocab_size)
        else:
            of_loss = self._loss_bytes(head, tokens, self.fused.loss_way)
            if self.fused.logits:
                of_loss += tokens * len(head) * head.dtype.itemsize
        self.fused.beside, self.fused.beside_for = bytes_beside_decoder(self, self.fused.updates) + of_loss, tokens

    def _loss_bytes(self, head: torch.Tensor, tokens: int, way: Way | None) -> int:
        gradient = gradient_dtype(head).itemsize if head.requires_grad else 0
        width = min(head.dtype.itemsize, 2)
        converts = head.dtype.itemsize != width
        vocabulary, hidden = head.shape
        embeddings: Any = self.model.embed_tokens
        stream = in_use(embeddings).weight.dtype.itemsize
        return loss_bytes(tokens, vocabulary, hidden, width, stream, gradient, way, converts=converts)

    def narrow_loss(self, tokens: int) -> bool:
        """Cut the loss from now on as needs least for a batch of that many tokens; whether that is less than so far."""
        head, before = self._head_of_the_loss(), self.fused.loss_way
        if head is None:
            return False
        ways: tuple[Way | None, ...] = (before, *get_args(Way))  # where others need as much it stays as it is
        needed = {way: self._loss_bytes(head, tokens, way) for way in ways}
        self.fused.loss_way = min(ways, key=needed.__getitem__)
        return needed[self.fused.loss_way] < needed[before]

    def _head_of_the_loss(self) -> torch.Tensor | None:
        """The head's weight [V, H]; None, and a line says why, where the loss is not one of these alone."""
        try:
            refuse_patch(library_class_of(self))
            if self.loss_function is not ForCausalLMLoss:
                raise Unfused("the model has a loss of its own")
            return _head_weight(self.lm_head)
        except Unfused as reason:
            self.fused.say_once(f"the loss goes through the whole logits of a batch: {reason}", fused=True)
            return None

    @torch.no_grad()
    def _logits(self, hidden_states: torch.Tensor, softcap: float | None) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _head_weight(head: Any) -> torch.Tensor:
    for part in (head, in_use(head)):
        refuse_hooks(part, "lm_head")
        refuse_patch(type(part))
    head = in_use(head)
    if isinstance(head, OriginalHead):
        return head.weight
    if isinstance(head, LoraLayer):
        raise Unfused("lm_head has LoRA")
    if type(head) is not nn.Linear:
        raise Unfused(f"lm_head is a {type(head).__name__}")
    if head.bias is not None:
        raise Unfused("lm_head has a bias")
    return head.weight


def _check_labels(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse labels that the head has no row for, as torch's own loss does: on a GPU by an assertion there, which the
    host does not wait for.

    Raises:
        IndexError: there are such labels, on a CPU.
    """
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if labels.is_cuda:
        torch._assert_async(known.all(), f"a label is outside of the vocabulary of {vocabulary}")
    elif not known.all():
        raise IndexError(
            f"label {int(labels[~known][0])} is outside of the vocabulary of {vocabulary}: the tokenizer has more "
            "tokens than the model has rows"
        )
