"""`steep train` as it is, timed: its command in this process, on text whose rows are documents of the length asked for.

The time of a step is that between two ends of an optimizer step: data, logging and clipping are in it. The device is
waited for by the command alone (each step reads its gradients' norms), but at the first end, which is counted from the
start of the process, with planning and scoring of the base.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import ALPHA, LEARNING_RATE, LONGEST, SHORTEST, Work, synchronize
from benchmarks.shapes import SPECIAL


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
            "logging_steps": 1,
        },
        "evaluation": {"max_tokens": 4096},
    }  # fmt: skip


def steep_train(work: Work, vocab_size: int, temporary: Path, begun: float, words: list[str]) -> dict[str, Any]:
    """As `bare_loop`; `words` are further ones for the command."""
    from steep import cli
    from steep.training.trainer import Trainer

    text, file = temporary / "text.jsonl", temporary / "run.yaml"
    started = time.time()
    write_text(text, work, vocab_size)
    begun += time.time() - started  # the text is not part of the run
    file.write_text(yaml.safe_dump(run_file(work, text, temporary / "run")))
    ends: list[float] = []
    losses: list[float] = []
    first = 0.0
    stepped, logged = Trainer._after_optimizer_step, Trainer.log

    def after(self: Trainer) -> None:
        nonlocal first
        stepped(self)
        if not ends:
            synchronize(work.device)
            first = time.time() - begun
        ends.append(time.perf_counter())

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
            raise RuntimeError(f"steep train ended with {stop.code}") from stop
    finally:
        Trainer._after_optimizer_step, Trainer.log = stepped, logged
    seconds = [end - begin for begin, end in zip([float("nan"), *ends], ends, strict=False)]  # the first has no begin
    return {"seconds": seconds, "losses": losses, "first_step_s": first}
