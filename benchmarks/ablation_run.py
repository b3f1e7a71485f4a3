"""One run of the ablation: an arm, a seed and a rate, from text to a line of figures."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.ablation_arms import Arm, arm_over, run_file
from benchmarks.measuring import versions
from benchmarks.real_runs import columns
from steep.config import parse_config
from steep.evaluation.score import DomainScore
from steep.export.gate import free_memory
from steep.model.load import load_resolved
from steep.plan import plan_run
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.training.trainer import Trainer

NEW_TEXTS, OLD_TEXT = {"ko-tech": "ko", "ko-law": "ko", "en-med": "med"}, "en-books"
OLD_DOMAIN = "en"
UNSEEN_TEXT, UNSEEN_DOMAIN = "en-wiki", "wiki"  # in the old language, and never replayed
GRID, RUN = "grid", "run"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """What runs have in common that are held against each other.

    Attributes:
        model: the folder's name.
        text: what is learned.
        data: its name and that of the old text, with the first digits of their SHA-256.
        tokens: trained in a run, in full rows.
        untied: a tied head is made a matrix of its own.
        heldout_tokens: scored of each domain at the most.
        gpu: the card's name, or "none".
    """

    model: str
    text: str
    data: str
    tokens: int
    batch: int
    seq: int
    r: int
    untied: bool
    heldout_tokens: int
    gpu: str

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.seq)

    @property
    def of_grid(self) -> Work:
        """With half the tokens."""
        return dataclasses.replace(self, tokens=self.steps // 2 * self.batch * self.seq)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        part: `GRID` (it is there to find a rate) or `RUN`.
        over: the rung of the ladder that the arm stands on; empty for one of the ladder.
        model_folder, data_folder: on this machine; in no line of results.
        command: how the ablation was called.
        at_once: processes that share the card.
        weights: first digits of the SHA-256 of the model's files.
    """

    part: str
    arm: str
    over: str
    seed: int
    learning_rate: float
    work: Work
    model_folder: Path
    data_folder: Path
    vram: str
    command: str
    at_once: int
    weights: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells a line of results from all others."""
        work = dataclasses.asdict(self.work)
        embedding_rate = self.definition.embedding_rate(self.learning_rate)
        return {
            "part": self.part, "arm": self.arm, "over": self.over, "seed": self.seed,
            "learning_rate": self.learning_rate, "embedding_learning_rate": embedding_rate, **work,
        }  # fmt: skip

    @property
    def definition(self) -> Arm:
        return arm_over(self.arm, self.over)


def files(data: Path, text: str) -> dict[str, Path]:
    """The four files of a work, by what they are for."""
    return {
        "train": data / f"{text}.train.jsonl.gz",
        "heldout": data / f"{text}.heldout.jsonl.gz",
        "replay": data / f"{OLD_TEXT}.train.jsonl.gz",
        "old heldout": data / f"{OLD_TEXT}.heldout.jsonl.gz",
    }


def data_name(data: Path, text: str) -> str:
    digest = hashlib.sha256()
    for file in files(data, text).values():
        digest.update(file.read_bytes())
    return f"{text}+{OLD_TEXT}:{digest.hexdigest()[:12]}"


def weights_name(model: Path) -> str:
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def run_config(job: Job, output: Path) -> RunConfig:
    arm, work, found = job.definition, job.work, files(job.data_folder, job.work.text)
    domain = NEW_TEXTS[work.text]
    sources = [
        {"path": str(found["train"]), "role": "train", "domain": domain},
        {"path": str(found["heldout"]), "role": "heldout", "domain": domain},
        {"path": str(found["old heldout"]), "role": "heldout", "domain": OLD_DOMAIN},
    ]
    if (unseen := job.data_folder / f"{UNSEEN_TEXT}.heldout.jsonl.gz").exists():
        sources.append({"path": str(unseen), "role": "heldout", "domain": UNSEEN_DOMAIN})
    if arm.replay:
        sources.insert(1, {"path": str(found["replay"]), "role": "replay", "domain": OLD_DOMAIN})
    own = run_file(arm, work.r, job.learning_rate)
    return parse_config({
        "model": {
            "name": str(job.model_folder), "compute_dtype": "bf16", "trained_dtype": "fp32", "fused": "off",
            "untie_embeddings": work.untied, **own["model"],
        },
        "adapter": own["adapter"],
        "data": {"sources": sources, "max_length": work.seq, "holdout": 0.0, **own["data"]},
        "training": {
            "output_dir": str(output), "max_steps": work.steps, "per_device_train_batch_size": work.batch,
            "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "optim": "adamw_8bit",
            "seed": job.seed, "save_strategy": "no", "logging_steps": 1, "vram": job.vram, **own["training"],
        },
        "evaluation": {"max_tokens": work.heldout_tokens},
    })  # fmt: skip


def check(job: Job) -> None:
    """That a run can be done, by its plan.

    Raises:
        SystemExit: there is too little text to train each row once, or replay is not what the arm says.
        UserError: settings do not go together.
    """
    with tempfile.TemporaryDirectory() as temporary:
        corpus = plan_run(run_config(job, Path(temporary) / "run"), refuses=True).corpus
    work, rows = job.work, len(corpus.train)
    if rows < work.steps * work.batch:
        raise SystemExit(
            f"--tokens: {job.arm} trains {work.steps * work.batch:,} rows of {work.seq:,} tokens, each once, and the "
            f"text has {rows:,}. Give fewer, or more text."
        )
    share, asked = corpus.mixing["replay_share_achieved"], job.definition.replay
    if abs(share - asked) > 0.1 * asked:
        raise SystemExit(
            f"--data: {job.arm} replays {share:.1%} of its tokens, not {asked:.0%}: {OLD_TEXT} has too little text, or "
            f"the same as {work.text}."
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Attributes:
        steps: a line for each step, as `metrics.jsonl` has them.
        proof, ledger: as the run folder has them.
    """

    before: list[DomainScore]
    after: list[DomainScore]
    steps: list[dict[str, Any]]
    proof: dict[str, Any]
    ledger: dict[str, Any]


def train_adapters(config: RunConfig) -> Trained:
    """With `steep train`."""
    folder = RunFolder(config.training.output_dir)
    result = train_run(config)
    return Trained(
        result["before"], result["after"], list(folder.read_lines("metrics.jsonl")), folder.read_json("proof.json"),
        folder.read_json("ledger.json"),
    )  # fmt: skip


class _Steps(transformers.TrainerCallback):
    """Keeps what is logged of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "tokens" in logs:
            self.rows.append({"step": state.global_step, **logs})


def train_whole(config: RunConfig) -> Trained:
    """All weights, in fp32 masters under autocast: `steep train` has only adapters, so the plan's rows and arguments
    go to `steep.Trainer` with transformers' model."""
    plan = plan_run(config, refuses=True)
    transformers.set_seed(config.training.seed)
    model = load_resolved(
        plan.resolved, plan.tokenizer, base=plan.base, compute_dtype=plan.compute,
        attn_implementation=config.model.attn_implementation,
    )  # fmt: skip
    model.requires_grad_(True)
    trainer = Trainer(model=model, args=plan.arguments, train_dataset=plan.corpus, processing_class=plan.tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    steps = _Steps()
    trainer.add_callback(steps)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert trainer.proof is not None
    before, after = trainer.evaluations
    return Trained(before, after, steps.rows, trainer.proof.report(), trainer.ledger())


def refuse_unequal(ledger: Mapping[str, Any], work: Work) -> None:
    """
    Raises:
        RuntimeError: the run did not train the tokens that all arms train, each row once.
    """
    rows = work.steps * work.batch
    if not ledger["adds_up"]:
        raise RuntimeError(f"its ledger does not add up: {'; '.join(ledger['problems'])}")
    if ledger["rows_trained"] != rows or ledger["rows_seen"] != rows:
        raise RuntimeError(
            f"it trained {ledger['rows_trained']} rows of {ledger['rows_seen']} seen, and {rows} are meant"
        )
    if again := {times for times in ledger["times_seen"] if int(times) > 1}:
        raise RuntimeError(
            f"the text has {ledger['rows']} rows, and some were seen {', '.join(sorted(again))} times: a loss on rows "
            "seen before says nothing of others. Give fewer --tokens"
        )


def trained_tensors(proof: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors moved, by the module that they are of: ``q_proj``, ``embed_tokens``, ..."""
    moved = (name for name, record in proof["trained"].items() if record["trained"])
    parts = ([part for part in name.split(".") if part not in _WITHIN] for name in moved)
    return dict(sorted(Counter(part[-1] for part in parts).items()))


_WITHIN = {"weight", "bias", "default", "lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save"}


def curve(steps: Iterable[Mapping[str, Any]], work: Work) -> dict[str, list[float]]:
    """Loss by tokens in full rows."""
    rows = [(row["step"], float(f"{row['loss']:.6g}")) for row in steps if math.isfinite(row["loss"])]
    return {
        "step": [step for step, _ in rows],
        "tokens": [step * work.batch * work.seq for step, _ in rows],
        "loss": [loss for _, loss in rows],
    }


def peak_rates(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The highest rate that each group of parameters was trained at."""
    prefix, peaks = "learning_rate_", {}
    for row in steps:
        for name, rate in row.items():
            if name.startswith(prefix):
                group = name.removeprefix(prefix)
                peaks[group] = max(rate, peaks.get(group, 0.0))
    return peaks


def one_run(job: Job) -> dict[str, Any]:
    """Train and score; the line that says it. `begun` and `ended` are Unix time: of runs that share a card they say how
    long it was held."""
    begun, arm, on_gpu = time.time(), job.definition, torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as temporary:
        config = run_config(job, Path(temporary) / "run")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trained = (train_whole if arm.whole else train_adapters)(config)
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    free_memory()
    refuse_unequal(trained.ledger, job.work)
    ended = time.time()
    domains = [score.domain for score in trained.after]
    return {
        **job.key, "steps": job.work.steps, "targets": trained.ledger["targets_trained"],
        "replay_share": arm.replay, "peak_rates": peak_rates(trained.steps),
        "trained_tensors": trained_tensors(trained.proof), "curve": curve(trained.steps, job.work),
        "before": columns(trained.before, domains), "after": columns(trained.after, domains),
        "heldout": {score.domain: [score.documents, score.tokens] for score in trained.after},
        "peak_allocated_gib": peak, "begun": begun, "ended": ended, "seconds": ended - begun, "at_once": job.at_once,
        "weights": job.weights, "versions": versions(), "command": job.command,
    }  # fmt: skip
