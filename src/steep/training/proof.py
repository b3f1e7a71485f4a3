"""Proof that every parameter meant to train did, and that nothing else changed.

Known tools have shipped recipes whose embeddings silently never trained. So steep observes the run itself: the
gradients that the optimizer was given, the values before and after, and a checksum of everything frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn

from steep.errors import RunError
from steep.model.checksum import checksum
from steep.model.original_module import OriginalModule
from steep.ops import master_weights
from steep.training.adamw8bit import AdamW8bit

MIN_UPDATES = 3  # LoRA's A has no gradient until B has moved, and a warm-up starts at a rate of zero
_FIRST_FREQUENCIES = "original_inv_freq"  # transformers' buffer beside `inv_freq`; a layer's kind may stand before
MAX_SAMPLED = 2**14  # elements of one tensor that are watched: a share is then known to ±0.8 %


@dataclass
class TensorRecord:
    """What was seen of one trained tensor.

    Attributes:
        group, learning_rate: its parameter group, and that group's highest rate so far.
        updates: steps applied to its group at a rate above zero.
        nonzero_gradient: whether an applied step had one; none is applied with a gradient that is not finite.
        elements, elements_checked: its size, and how many of its elements were compared.
        changed_share: share of the compared elements that moved by more than weight decay alone would move them.
    """

    group: str
    learning_rate: float = 0.0
    updates: int = 0
    nonzero_gradient: bool = False
    elements: int = 0
    elements_checked: int = 0
    changed_share: float = 0.0

    @property
    def trained(self) -> bool:
        return self.nonzero_gradient and self.changed_share > 0


def frozen_checksums(model: nn.Module, *, of_files: bool = False) -> dict[str, str]:
    """Checksums of every parameter that does not train and of every buffer of `model`, and of the scales that
    bitsandbytes keeps beside its codes, outside parameters and buffers; also of the originals of trained embeddings,
    by the names that they had as parameters.

    The frequencies of rotary embeddings are taken as they were first. With LongRoPE (Phi-3, Phi-4-mini) each forward
    puts those for short or for long rows in their place.

    Args:
        of_files: read those originals again, from the base's files; else they are as they were when they left memory.
    """
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    buffers = dict(model.named_buffers(remove_duplicate=False))  # after a short row both are one in transformers 5.17
    anew = {name.replace(_FIRST_FREQUENCIES, "inv_freq") for name in buffers if _FIRST_FREQUENCIES in name}
    frozen |= {name: tensor for name, tensor in buffers.items() if name not in anew}
    for name, tensor in list(frozen.items()):
        quant_state = getattr(tensor, "quant_state", None)
        if quant_state is not None:  # 4 bit
            frozen |= {f"{name}.{key}": part for key, part in quant_state.as_dict(packed=True).items()}
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt) and not module.state.has_fp16_weights:
            weight: Any = module.weight
            holder: Any = module.state if weight.SCB is None else weight  # the first forward moves it to the state
            frozen[f"{name}.SCB"] = holder.SCB
    checksums = {name: checksum(tensor) for name, tensor in frozen.items()}
    known = set()
    for name, module in model.named_modules():
        if isinstance(module, OriginalModule) and module.matrix not in known:  # a tied pair is one matrix
            known.add(module.matrix)
            matrix = module.matrix
            checksums[f"{name}.weight"] = matrix.checksum(module.device) if of_files else matrix.recorded
    return checksums


def other_tensors(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Which of two models' `frozen_checksums` differ, in words; None where none does."""
    names = before.keys() | now.keys()
    other = sorted(name for name in names if before.get(name) != now.get(name))
    return f"{len(other)} of {len(names)} frozen tensors differ, the first of them {other[0]}" if other else None


class Proof:
    """Watches the trainable tensors of a model through a run.

    Args:
        model: the model, as it is before the first step of this process.
        groups: name of the parameter group of each trainable parameter, by parameter name.
        seed: chooses the elements that are watched in large tensors.
        optimizer: that updates them. Where a weight has a master, that is watched: it moves before its bf16 does.

    Attributes:
        records: what was seen of each trained tensor, by name.
        files: frozen tensor → the file that it is read from, of those that are not in memory.
    """

    def __init__(
        self, model: nn.Module, groups: dict[str, str], seed: int = 0, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._seed, self._optimizer = seed, optimizer
        self.records = {
            name: TensorRecord(groups[name], elements=p.numel(), elements_checked=min(p.numel(), MAX_SAMPLED))
            for name, p in self._parameters.items()
        }
        self._start = {name: self._sample(p) for name, p in self._parameters.items()}
        self._decay_only = dict.fromkeys(self._parameters, 1.0)
        self._frozen = frozen_checksums(model)
        self._changed: list[str] | None = None
        self._model = model
        self.files = {
            f"{name}.weight": module.matrix.file
            for name, module in model.named_modules()
            if isinstance(module, OriginalModule)
        }

    def _sample(self, parameter: torch.Tensor) -> torch.Tensor:
        low = self._optimizer.low_of(parameter) if isinstance(self._optimizer, AdamW8bit) else None
        weights = self._watched(parameter)
        return weights if low is None else master_weights.join(weights, self._watched(low))

    def _watched(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().reshape(-1)
        if flat.numel() > MAX_SAMPLED:
            # Drawn on the CPU, so that a resumed run on another device watches the same elements.
            generator = torch.Generator().manual_seed(self._seed)
            index = torch.randint(flat.numel(), (MAX_SAMPLED,), generator=generator)
            flat = flat[index.to(flat.device)]
        return flat.to("cpu", copy=True)

    def observe(self, norms: dict[str, float], optimizer: torch.optim.Optimizer) -> None:
        """Note one applied step: the gradient norm of each tensor, and the rates of `optimizer`'s groups."""
        settings = {
            id(parameter): (group["lr"], group.get("weight_decay", 0.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self._parameters.items():
            record = self.records[name]
            rate, decay = settings[id(parameter)]
            rate = float(rate)
            if rate > 0:
                record.updates += 1
                record.learning_rate = max(record.learning_rate, rate)
            self._decay_only[name] *= 1 - rate * decay
            record.nonzero_gradient |= norms.get(name, 0.0) > 0

    def measure(self) -> None:
        """Compare the watched elements with their first values."""
        for name, parameter in self._parameters.items():
            start, now = self._start[name].double(), self._sample(parameter)
            kept = self._decay_only[name]
            # Beyond decay's own pull, and a rounding of the storage where decay made one.
            slack = start.abs() * ((1 - kept) + (torch.finfo(now.dtype).eps if kept < 1 else 0.0))
            share = float(((now.double() - start * kept).abs() > slack).double().mean())
            self.records[name].changed_share = max(self.records[name].changed_share, share)

    @property
    def ready(self) -> bool:
        """Whether each group has had enough applied updates at a rate above zero to be judged."""
        return all(record.updates >= MIN_UPDATES for record in self.records.values())

    def untrained(self) -> list[str]:
        """Names of the tensors that did not train although they had their updates."""
        return [name for name, r in self.records.items() if r.updates >= MIN_UPDATES and not r.trained]

    def judge(self) -> None:
        """Measure, and stop the run if a tensor that was meant to train did not, though it had its updates.

        Raises:
            RunError: with the names of the tensors.
        """
        self.measure()
        failed = self.untrained()
        if failed:
            reasons = "; ".join(f"{name} ({self._reason(name)})" for name in failed[:5])
            more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
            raise RunError(
                f"{len(failed)} of {len(self.records)} tensors that are meant to train did not: {reasons}{more}. "
                "The run is stopped because its result would not be what its settings say."
            )

    def _reason(self, name: str) -> str:
        record = self.records[name]
        if not record.nonzero_gradient:
            return "its gradient was always zero or missing"
        return "no element changed by more than weight decay; its updates may all round away in " + str(
            self._parameters[name].dtype
        ).removeprefix("torch.")

    def changed_frozen(self) -> list[str]:
        """Names of the frozen tensors whose bytes differ from the start."""
        now = frozen_checksums(self._model, of_files=True)
        self._changed = sorted(
            name for name in self._frozen.keys() | now.keys() if self._frozen.get(name) != now.get(name)
        )
        return self._changed

    def report(self) -> dict[str, Any]:
        """`proof.json`: each trained tensor's record, and whether everything frozen was bit-identical when last
        compared."""
        changed = self.changed_frozen() if self._changed is None else self._changed
        return {
            "complete": self.ready,
            "trained": {name: {**asdict(r), "trained": r.trained} for name, r in self.records.items()},
            "frozen_tensors": len(self._frozen),
            "frozen_changed": changed,
            "ok": self.ready and not changed and all(r.trained for r in self.records.values()),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the observations so far."""
        return {"records": {name: asdict(r) for name, r in self.records.items()}, "frozen": self._frozen,
                "start": self._start, "decay_only": self._decay_only}  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept.

        Raises:
            RunError: the frozen tensors are not those of the run's first step.
        """
        self.refuse_other_base(state)
        shapes = {name: start.shape for name, start in self._start.items()}
        if shapes != {name: start.shape for name, start in state["start"].items()} or shapes.keys() != {
            *state["records"]
        }:
            raise RunError("the checkpoint's proof is of other tensors than this run trains. Put the checkpoint back")
        for name, record in state["records"].items():
            self.records[name] = TensorRecord(**record)
        self._start, self._decay_only = state["start"], state["decay_only"]

    def refuse_other_base(self, state: dict[str, Any]) -> None:
        """Compare the frozen tensors with those that a checkpoint was trained over.

        Raises:
            RunError: they differ.
        """
        if other := other_tensors(state["frozen"], self._frozen):
            raise RunError(
                f"this is not the base model that the run began with: {other}. Put it back, or start a new run"
            )
