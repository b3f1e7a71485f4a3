"""bitsandbytes' AdamW, with 8-bit states or fp32 ones, that does not lose small updates of bf16 weights.

A bf16 weight keeps 8 bits of mantissa: near 1.0 its neighbours are 0.4 % apart, so at a rate of 5e-6 nearly every
update rounds back to the old value. Stochastic rounding keeps the update in expectation (Gupta et al. 2015; Zamirai et
al. 2020): the update runs in fp32, and the result is rounded up or down with the probability of its distance. Or a
weight has an fp32 master: 16 bits more, which stand beside the moments (`ops/master_weights.py`).

On a GPU `ops/adamw8bit.py` updates all tensors in a launch or a few. On a CPU bitsandbytes' own functions do. The
states are bitsandbytes' on both, in name and format. Those that live in host memory come to the card for their update
(`ops/host_states.py`), and leave it the same weights and states, to the bit.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from bitsandbytes.optim import AdamW

from steep.errors import UserError
from steep.ops.adamw8bit import Launch, Update, launches, noise_key
from steep.ops.backend import uses_kernels
from steep.ops.host_states import HostState, Staging, host_states
from steep.ops.row_gradient import coalesced, places
from steep.training.bitsandbytes_update import Piece, cut, update
from steep.training.prepared_step import Dependencies

Offload = Literal["none", "embeddings", "all"]
Masters = Literal["none", "embeddings", "all"]
States = Literal["8bit", "fp32"]
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit")  # the names that it has in `optim`
OFFLOADS: tuple[Offload, ...] = ("none", "embeddings", "all")
MASTERS: tuple[Masters, ...] = OFFLOADS
STATES: tuple[States, ...] = ("8bit", "fp32")

SMALLEST_OFFLOADED = 4096  # elements; what is smaller keeps fp32 states, and they stay with it

# Calls of `update` within which one over host memory is to be done: its gradients stay meanwhile, which are few where
# they are a layer's. Who cannot leave them that long awaits it by `finish_updates`.
UPDATES_UNDER_WAY = 4

# Elements whose states share a block of host memory: a layer's adapters, or more of smaller ones.
SHARED = 2**25

_STATES = ("state1", "state2", "absmax1", "absmax2", "low")  # in the order of `HostState`


class _Place(NamedTuple):
    """Of a parameter: its group, its number in the group, and that in all groups; whether its states live in host
    memory, and whether it has an fp32 master."""

    gindex: int
    pindex: int
    index: int
    offloaded: bool
    master: bool


class _Slot(NamedTuple):
    """A parameter that has a gradient, its state and its place."""

    parameter: torch.Tensor
    state: dict[str, Any]
    place: _Place

    @property
    def gradient(self) -> torch.Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad


@dataclass(frozen=True)
class _Work:
    """An update up to its launches: the slots that the kernel updates, by group those that bitsandbytes does."""

    slots: list[_Slot]
    others: dict[int, list[_Slot]]
    launches: dict[torch.device, list[Launch]]
    hosted: dict[torch.device, list[tuple[Update, HostState]]]


class _UnderWay(NamedTuple):
    """An update over host memory: the number of its call, its end, and what it reads until then."""

    call: int
    done: torch.cuda.Event | None
    device: torch.device
    reads: object


class AdamW8bit(AdamW):
    """bitsandbytes' AdamW; bf16 parameters are updated in fp32 and rounded stochastically, or have fp32 masters.

    fp32 parameters are updated as bitsandbytes does, and fp16 ones by bitsandbytes. The rounding noise is keyed by
    (seed, step, tensor), on a CPU too: a resumed run draws what an uninterrupted one would have drawn, and the order
    of tensors is of no matter.

    Args:
        params: parameters or groups, as for every optimizer.
        seed: of the rounding noise.
        offload: whose states live in page-locked host memory: of the group named ``embeddings``, of all, or of none.
            A tensor of less than 4,096 elements keeps them.
        states: "8bit", but of tensors of less than 4,096 elements; or "fp32".
        masters: whose bf16 weights have an fp32 master, beside their states: of the group named ``embeddings``, of all,
            or of none.
        **kwargs: `bitsandbytes.optim.AdamW`'s own.

    Attributes:
        gradient_factor: fp32, one element: multiplies every gradient of the next `step`, which then forgets it. On a
            GPU clipping so takes no pass of its own, and the gradients stay as they are; elsewhere they are scaled in
            place.
    """

    def __init__(
        self,
        params: Any,
        *,
        seed: int = 0,
        offload: Offload = "none",
        states: States = "8bit",
        masters: Masters = "none",
        **kwargs: Any,
    ) -> None:
        assert offload in OFFLOADS and states in STATES and masters in MASTERS, (offload, states, masters)
        self.offload, self.states, self.masters = offload, states, masters
        super().__init__(params, **{**kwargs, "optim_bits": {"8bit": 8, "fp32": 32}[states]})
        self.non_castable_tensor_keys.add("low")
        if states == "fp32":
            self.fill_qmap()  # bitsandbytes does not, and the kernel is given the maps anyway
        self.seed = seed
        self.gradient_factor: torch.Tensor | None = None
        self._prepared: tuple[Dependencies, _Work] | None = None
        self._hosted: dict[torch.Tensor, HostState] = {}
        self._staging: dict[torch.device, Staging] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._calls = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._places: dict[torch.Tensor, _Place] = {}
        for gindex, group in enumerate(self.param_groups):
            chosen = {"all", group.get("name")} - {"none"}
            for pindex, parameter in enumerate(group["params"]):
                offloaded = self.offload in chosen and parameter.numel() >= SMALLEST_OFFLOADED
                master = self.masters in chosen and parameter.dtype == torch.bfloat16
                self._places[parameter] = _Place(gindex, pindex, len(self._places), offloaded, master)

    @torch.no_grad()
    def prepare(self) -> None:
        """Work out the next `step` as far as the host has to, while the GPU still computes the gradients that there are
        now. A step over other gradients, or at other rates, works it out anew."""
        work = self._worked_out(self._places)  # which may move a parameter
        self._prepared = Dependencies(self), work

    def forget_prepared(self) -> None:
        """Let go of a step that was prepared and is not taken, and of the gradients that it holds."""
        self._prepared = self.gradient_factor = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every tensor that has a gradient.

        bitsandbytes' own loop waits for the GPU after each tensor; nothing here is paged, and on one stream the order
        is kept without waiting.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self.gradient_factor = self.gradient_factor, None
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0].hold(self):
            self._apply(prepared[1], factor)
        else:
            self._apply(self._worked_out(self._places), factor)
        self.finish_updates()
        return loss

    @torch.no_grad()
    def update(self, parameters: Iterable[torch.Tensor]) -> None:
        """The update of these tensors alone, of those that have a gradient: to the bit as `step` makes it among all.

        Over host memory it may still be under way on a stream of its own: `finish_updates` comes before anybody reads
        these tensors.
        """
        self.finish_updates(but=UPDATES_UNDER_WAY - 1)
        self._calls += 1
        self._apply(self._worked_out(parameters), None)

    def finish_updates(self, but: int = 0) -> None:
        """Let what the current stream does from now on come after all updates, but those of the last calls. The host
        does not wait."""
        while self._under_way and self._under_way[0].call <= self._calls - but:
            under_way = self._under_way.popleft()
            if under_way.done is not None:
                torch.cuda.current_stream(under_way.device).wait_event(under_way.done)

    # ---- states

    def state_dict(self) -> dict[str, Any]:
        """bitsandbytes' own. The host waits for states that are still on their way to it."""
        for staging in self._staging.values():
            staging.synchronize()
        return super().state_dict()

    def low_of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """int16, what the master of a bf16 parameter has beside it, if there is one. The host waits for it as above."""
        for staging in self._staging.values():
            staging.synchronize()
        return self.state.get(parameter, {}).get("low")

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """bitsandbytes' own. Masters that are not there begin as the weights, and those that are not asked for go.

        Raises:
            UserError: a tensor's states are in 8 bits and ought to be in fp32, or the other way round.
        """
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, place in self._places.items():
            if parameter in self.state:
                self._fit(parameter, self.state[parameter], place)
        if move_to_device:
            self._put_states(of_cpu=True)

    def _fit(self, parameter: torch.Tensor, state: dict[str, Any], place: _Place) -> None:
        config = self._config(place)
        coded = config["optim_bits"] == 8 and parameter.numel() >= config["min_8bit_size"]
        if (state["state1"].dtype == torch.uint8) != coded:
            kind, other = STATES if coded else STATES[::-1]
            raise UserError(
                "optimizer_states", f"it is {kind}, and the states to go on with are {other}", f"Give {other}."
            )
        if not place.master:
            state.pop("low", None)
        elif "low" not in state:
            state["low"] = self.get_state_buffer(parameter, torch.int16)

    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        super().init_state(group, p, gindex, pindex)
        if self._places[p].master:
            self.state[p]["low"] = self.get_state_buffer(p, torch.int16)

    def to_gpu(self) -> None:
        self._put_states()

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # What is offloaded is put into its block by the next update. Contiguous, as the parameter is by then.
        return torch.zeros(p.shape, dtype=dtype, device="cpu" if self._places[p].offloaded else p.device)

    def _put_states(self, of_cpu: bool = False) -> None:
        """Put each state where its parameter is, or into host memory; of_cpu: those of parameters on a CPU too."""
        for parameter, place in self._places.items():
            if parameter not in self.state or (parameter.device.type == "cpu" and not of_cpu):
                continue
            state = self.state[parameter]
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    stays = name in _STATES and place.offloaded
                    state[name] = value.cpu() if stays else value.to(parameter.device)

    def _put_into_host_memory(self, run: Sequence[_Slot]) -> None:
        """The states of some tensors of a device: new ones, and those of a checkpoint, which may replace others."""
        if not run:
            return
        device = run[0].parameter.device
        replaced = [self._hosted.pop(slot.parameter) for slot in run if slot.parameter in self._hosted]
        if replaced:
            self._staging_on(device).forget(replaced)
        given = [list(_states_in(slot.state).values()) for slot in run]
        for slot, kept in zip(run, host_states(given, device), strict=True):
            self._hosted[slot.parameter] = kept
            slot.state.update(zip(_states_in(slot.state), kept.tensors, strict=True))

    def _is_hosted(self, slot: _Slot) -> bool:
        kept, states = self._hosted.get(slot.parameter), _states_in(slot.state).values()
        return kept is not None and len(kept.tensors) == len(states) and all(map(operator.is_, kept.tensors, states))

    def _staging_on(self, device: torch.device) -> Staging:
        if device not in self._staging:
            self._staging[device] = Staging(device)
        return self._staging[device]

    # ---- the update

    def _apply(self, work: _Work, factor: torch.Tensor | None) -> None:
        for gindex, slots in work.others.items():
            if factor is not None:
                for slot in slots:
                    slot.gradient.mul_(factor.to(slot.parameter.device))
            update(self._pieces(gindex, slots))
        for slot in work.slots:
            slot.state["step"] += 1
        for device, updates in work.hosted.items():  # first: their copies take longest
            on_device = None if factor is None else factor.to(device, torch.float32).view(1)
            done = self._staging_on(device).run(updates, self._maps(device), on_device)
            self._under_way.append(_UnderWay(self._calls, done, device, (updates, on_device)))
        for device, launches_there in work.launches.items():
            on_device = None if factor is None else factor.to(device, torch.float32).view(1)
            for launch in launches_there:
                launch.run(on_device)

    def _worked_out(self, parameters: Iterable[torch.Tensor]) -> _Work:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        by_kernel: list[_Slot] = []
        others: dict[int, list[_Slot]] = {}
        by_device: dict[torch.device, list[_Slot]] = {}
        offloaded: dict[torch.device, list[_Slot]] = {}
        run: list[_Slot] = []  # whose states are to go into host memory; few, since they are in memory twice meanwhile
        for slot in self._slots(parameters):
            if uses_kernels(slot.parameter) and slot.parameter.dtype in (torch.bfloat16, torch.float32):
                by_kernel.append(slot)
                device = slot.parameter.device
                if not slot.place.offloaded:
                    by_device.setdefault(device, []).append(slot)
                    continue
                offloaded.setdefault(device, []).append(slot)
                if not self._is_hosted(slot):
                    if run and (
                        run[0].parameter.device != device or sum(one.parameter.numel() for one in (*run, slot)) > SHARED
                    ):
                        self._put_into_host_memory(run)
                        run = []
                    run.append(slot)
            else:
                if slot.gradient.is_sparse:
                    slot.parameter.grad = slot.gradient.to_dense()
                others.setdefault(slot.place.gindex, []).append(slot)
        self._put_into_host_memory(run)
        launches_there = {
            device: launches(self._updates_of(slots), self._maps(device)) for device, slots in by_device.items()
        }
        hosted = {
            device: [(update, self._hosted[update.parameter]) for update in self._updates_of(slots)]
            for device, slots in offloaded.items()
        }
        return _Work(by_kernel, others, launches_there, hosted)

    def _slots(self, parameters: Iterable[torch.Tensor]) -> Iterator[_Slot]:
        """Those that have a gradient, with their states."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            place, state = self._places[parameter], self.state[parameter]
            if not parameter.is_contiguous():  # as its states are
                parameter.data = parameter.data.contiguous()
            if len(state) == 0:
                self.init_state(self.param_groups[place.gindex], parameter, place.gindex, place.pindex)
            yield _Slot(parameter, state, place)

    def _updates_of(self, slots: list[_Slot]) -> list[Update]:
        """The next ones."""
        found: list[Update] = []
        of_groups: dict[int, dict[str, Any]] = {}
        has_own = self.mng.index2config or self.mng.pid2config  # bitsandbytes' overrides of single tensors
        for parameter, state, place in slots:
            config = of_groups.get(place.gindex)
            if config is None or has_own:
                config = of_groups[place.gindex] = self._config(place)
            gradient, rows = parameter.grad, None
            assert gradient is not None
            if gradient.is_sparse:
                gradient = coalesced(gradient)
                rows, gradient = places(gradient._indices()[0], len(gradient)), gradient._values()
            step, first = state["step"] + 1, state["state1"]
            update = Update(
                parameter, gradient.contiguous(), (first, state["state2"]),
                (state["absmax1"], state["absmax2"]) if first.dtype == torch.uint8 else None,
                step, config["lr"], tuple(config["betas"][:2]), config["eps"], config["weight_decay"],
                noise_key(self.seed, step, place.index), rows, low=state.get("low"),
            )  # fmt: skip
            found.append(update)
        return found

    def _maps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        for name in ("dynamic", "udynamic"):  # a resumed run has made no state that would have moved them
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap["dynamic"], self.name2qmap["udynamic"]

    def _config(self, place: _Place) -> dict[str, Any]:
        return self.get_config(place.gindex, place.pindex, self.param_groups[place.gindex])

    def _pieces(self, gindex: int, slots: list[_Slot]) -> Iterator[Piece]:
        """The bf16 tensors of a group in pieces; those of other dtypes are updated on the way, as bitsandbytes does."""
        for slot in slots:
            if slot.parameter.dtype != torch.bfloat16:
                self.update_step(self.param_groups[gindex], slot.parameter, gindex, slot.place.pindex)
                continue
            slot.state["step"] += 1
            noise = torch.Generator(slot.parameter.device)
            noise.manual_seed(noise_key(self.seed, slot.state["step"], slot.place.index))
            yield from cut(slot.parameter, slot.state, self._config(slot.place), noise)


def _states_in(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those that can live in host memory."""
    return {name: state[name] for name in _STATES if name in state}
