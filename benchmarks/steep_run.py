"""steep's own peers, and what it chose.

`steep` is `steep train` as it is: its command in this process, on text whose rows are documents of the length asked
for. The time of a step is that between two ends of an optimizer step: data, logging and clipping are in it. The device
is waited for by the command alone (each step reads its gradients' norms), but at the first end, which is counted from
the start of the process, with planning and scoring of the base. `steep-fp8` is the same over a base in e4m3, and
`-lean` either without clipping, updated inside backward, with the optimizer's states in host memory.
`steep-bare` is its model and optimizer in the loop of the others. These are held to the work's memory, where it names
one: by `training.vram`, and by the same plan. `steep-script` is `hf` after `steep.install(model)`: what a script as
users have it gets.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.peers import ALPHA, LEARNING_RATE, LONGEST, SHORTEST, Peer, Work, hf, synchronize, trained
from benchmarks.profiling import account, events_of
from benchmarks.shapes import SPECIAL

_FP8 = "--model.base", "fp8"
_LEAN = (
    "--training.optimizer_in_backward", "true", "--training.max_grad_norm", "0", "--training.offload_optimizer", "all",
)  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "steep": (), "steep-fp8": _FP8, "steep-lean": _LEAN, "steep-fp8-lean": (*_FP8, *_LEAN),
}  # fmt: skip
"""Peers that are `steep train` itself, and what else each is told."""


def write_text(file: Path, work: Work, vocab_size: int) -> None:
    """Documents of random words, a token each, and the end's: of `seq` tokens, or of SHORTEST to LONGEST."""
    draw = random.Random(0)
    tokens = (work.steps + 4) * work.batch * work.seq * 5 // 4  # and those held out
    with file.open("w", encoding="utf-8") as stream:
        while tokens > 0:
            length = draw.randint(SHORTEST, LONGEST) if work.packed else work.seq
            words = draw.choices(range(len(SPECIAL), vocab_size), k=length - 1)
            stream.write(json.dumps({"text": " ".join(map(str, words))}) + "\n")
            tokens -= length


def run_file(work: Work, text: Path, output: Path) -> dict[str, Any]:
    return {
        "model": {"name": work.folder, "base": "nf4", "compute_dtype": "bf16", "trained_dtype": "bf16"},
        "adapter": {"r": work.r, "lora_alpha": ALPHA},
        "data": {"sources": [{"path": str(text)}], "max_length": work.seq, "holdout": 0.02},
        "training": {
            "output_dir": str(output), "max_steps": work.steps, "per_device_train_batch_size": work.batch,
            "gradient_accumulation_steps": 1, "learning_rate": LEARNING_RATE, "save_steps": 10 * work.steps,
            "logging_steps": 1, "vram": f"{work.cap_gib:.6f}GiB" if work.cap_gib else "auto",
        },
        "evaluation": {"max_tokens": 4096},
    }  # fmt: skip


def steep_bare(work: Work) -> Peer:
    """steep's parts as `steep train` puts them together."""
    from steep import add_adapters, install, load
    from steep.model.install import fused_of
    from steep.training.adamw8bit import AdamW8bit

    model, _ = load(work.folder, base="nf4", compute_dtype="bf16")
    model = add_adapters(model, r=work.r, lora_alpha=ALPHA, trained_dtype="bf16", offloads=True)
    model = install(model)
    if work.cap_gib:
        fused = fused_of(model)
        fused.levels, fused.loss_way, fused.tile = planned(work)
    return Peer(model, AdamW8bit(trained(model), lr=LEARNING_RATE, seed=0))


def steep_script(work: Work) -> Peer:
    """`hf`, installed.

    Raises:
        ValueError: the work names a limit: such a script has none to plan by.
    """
    from steep import install

    if work.cap_gib:
        raise ValueError("steep-script plans for the whole card: time it without --cap-gib")
    peer = hf(work)
    install(peer.model)
    return peer


def planned(work: Work) -> tuple[list[int], Any, Any]:
    """What `steep train` would keep in each layer within the work's memory, and how it would cut the loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from steep.model.machine import card_here
    from steep.planning.fusing import decide, fused_step, settle
    from steep.planning.memory import shape_of
    from steep.planning.vram import vram_budget
    from steep.schema import RunConfig

    tree = run_file(work, Path("text"), Path("run"))
    config = RunConfig.model_validate({**tree, "model": {**tree["model"], "fused": "on"}})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.folder), dtype=torch.bfloat16)
    card = card_here()
    layer, _ = decide(config, empty, None, card)
    assert layer is not None  # on, and an error otherwise
    budget = vram_budget(config.training.vram, card)
    step = fused_step(
        config, [layer], shape_of(empty, config.adapter), base="nf4", compute="bf16",
        trained="bf16", on_card=budget is not None,
    )  # fmt: skip
    choices = settle(config, step, budget, None)
    assert choices.levels is not None
    return choices.levels, choices.loss_way, choices.tile


def calls_of(model: Any) -> int:
    """Fused forwards so far."""
    from steep.model.install import fused_of, is_installed

    return fused_of(model).calls if is_installed(model) else 0


def chosen(model: Any, forwards: int) -> dict[str, Any]:
    """What steep computes `model` with now; `fused` only where that did all of `forwards` calls so far."""
    from steep.model.choices import choices_of

    choices = dataclasses.asdict(choices_of(model))
    return choices | {"fused": choices["fused"] and calls_of(model) >= forwards}


def steep_train(
    work: Work, vocab_size: int, temporary: Path, begun: float, words: list[str], profiled: int = 0
) -> dict[str, Any]:
    """As `bare_loop`, and what it chose.

    Args:
        words: further ones for the command.
        profiled: the last steps of which a profile is taken; they are not timed.
    """
    from steep import cli
    from steep.training.trainer import Trainer

    text, file = temporary / "text.jsonl", temporary / "run.yaml"
    started = time.time()
    write_text(text, work, vocab_size)
    begun += time.time() - started  # the text is not part of the run
    file.write_text(yaml.safe_dump(run_file(work, text, temporary / "run")))
    ends: list[float] = []
    losses: list[float] = []
    computed: dict[str, Any] = {}
    first, before = 0.0, 0
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profiled else None
    stepped, logged = Trainer._after_optimizer_step, Trainer.log

    def after(self: Trainer) -> None:
        nonlocal first, before
        stepped(self)
        if not ends:
            synchronize(work.device)
            first = time.time() - begun
            before = calls_of(self.model)  # the base was scored too
        ends.append(time.perf_counter())
        if profile and len(ends) in (work.steps - profiled, work.steps):
            synchronize(work.device)
            (profile.start if len(ends) < work.steps else profile.stop)()
        if len(ends) == work.steps:
            computed.update(chosen(self.model, before + work.steps - 1))

    def log(self: Trainer, logs: dict[str, Any], start_time: float | None = None) -> None:
        logged(self, logs, start_time)
        if "loss" in logs:  # steep puts its own in the place of what transformers gives
            losses.append(float(self.state.log_history[-1]["loss"]))

    Trainer._after_optimizer_step, Trainer.log = after, log
    sys.argv = ["steep", "train", str(file), *words]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise  # it has said why
    finally:
        Trainer._after_optimizer_step, Trainer.log = stepped, logged
    seconds = [end - begin for begin, end in zip([float("nan"), *ends], ends, strict=False)]  # the first has no begin
    seconds = seconds[: work.steps - profiled]
    plan = json.loads((temporary / "run" / "plan.json").read_text())
    computed["planned_gib"] = plan["memory_bytes"]["total"] / 2**30
    of_steps = {
        name: size for name, size in plan["host_bytes"].items() if name != "copy of a checkpoint"
    }  # none is made
    computed["planned_host_gib"] = sum(of_steps.values()) / 2**30
    if plan["duration"] is not None:
        computed["planned_s"], computed["measured"] = plan["duration"]["seconds_per_step"], plan["duration"]["measured"]
    found = {"seconds": seconds, "losses": losses, "first_step_s": first, "chosen": computed}
    return found | ({"profile": account(events_of(profile), profiled)} if profile else {})
