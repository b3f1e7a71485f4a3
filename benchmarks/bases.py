"""What a frozen base, and the arithmetic of its products, do to a training run: held-out loss, then merged.

    python -m benchmarks.bases --model FOLDER --data FOLDER [--arms nf4 fp8-both ...] [--seeds 3] [--first-seed 0]
                               [--steps 100] [--out FILE]
    python -m benchmarks.bases --summary FILE ... [--docs]

Each arm trains the same 16-bit model on the same Korean rows with `steep train`: rank 256, rank-stabilised with a scale
of 2, embeddings at a tenth of the rate, 8-bit AdamW with stochastic rounding, fused where there is a GPU. The seed is
that of adapters, order and rounding; a seed has the same rows in all arms.

    arm            base   products over it
    nf4            4 bit  bf16
    fp8-none       e4m3   bf16
    fp8-backward   e4m3   fp8 in dX alone
    fp8-both       e4m3   fp8 in both directions
    bf16           bf16   bf16

Scored are the same held-out documents in Korean and English, in nats a token and bits a byte: by the trained model in
the arithmetic that it was trained in, and after the adapter was merged into the 16-bit original, in bf16, opened with
plain transformers.

--data holds ko-tech and ko-law (.train.jsonl.gz, .heldout.jsonl.gz) and en-books.heldout.jsonl.gz. A run appends one
line of JSON to --out, by default `benchmarks/results/DATE-GPU-bases.jsonl`. A run whose line is there is not done
again, and several processes may share a file: give each other arms or seeds. --summary says what the lines come to
(`benchmarks/bases_table.py`); with --docs it writes that into docs/decisions.md, and bits a byte into docs/recipe.md,
else the exit code is 1 where the bar is not shown to hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases_arms import ARMS, DOMAINS, Work
from benchmarks.bases_table import bar_holds, in_docs, in_recipe, tell
from benchmarks.measuring import append, command, gpu_name, lines_of, results_file, versions
from benchmarks.real_runs import columns, tokenise_once
from steep.config import parse_config
from steep.evaluation.perplexity import evaluate
from steep.evaluation.score import DomainScore
from steep.export.adapter_weights import AdapterWeights
from steep.export.gate import free_memory, open_plainly
from steep.export.merged import Merger
from steep.model.attention import attention
from steep.model.choices import Choices
from steep.model.load import DTYPES, as_folder
from steep.result import choices_of_run, plan_again
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.terminal import Terminal

SCALE = 2.0
TRAINED, MEASURED = ("ko-tech", "ko-law"), {"ko": ("ko-tech", "ko-law"), "en": ("en-books",)}
GIB = 2**30
DOCS = Path(__file__).parent.parent / "docs" / "decisions.md"
RECIPE = DOCS.parent / "recipe.md"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model in 16 bits")
    parser.add_argument("--data", type=Path, help="folder of the corpora")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--heldout-tokens", type=int, default=100_000, help="scored of each language at the most")
    parser.add_argument("--vram", default="8GiB", help="what a run may fill of the card: others may be on it")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-GPU-bases.jsonl")
    parser.add_argument(
        "--summary", type=Path, nargs="+", metavar="FILE", help="say what the lines of files come to, and run nothing"
    )
    parser.add_argument("--docs", action="store_true", help="write it into docs/decisions.md and docs/recipe.md too")
    arguments = parser.parse_args(words)
    if arguments.summary is None and not (arguments.model and arguments.data):
        parser.error("give --model and --data, or --summary")
    if arguments.docs and not arguments.summary:
        parser.error("--docs is of a --summary")
    return arguments


def refuse(arguments: argparse.Namespace) -> None:
    """
    Raises:
        SystemExit: a file is not there.
    """
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"--model: {arguments.model} holds no model.")
    absent = [file.name for file, _, _ in texts(arguments.data) if not file.is_file()]
    if absent:
        raise SystemExit(f"--data: {arguments.data} lacks {', '.join(absent)}.")


def texts(data: Path) -> Iterator[tuple[Path, str, str]]:
    """File, role and domain of each source."""
    for name in TRAINED:
        yield data / f"{name}.train.jsonl.gz", "train", "ko"
    for domain, names in MEASURED.items():
        for name in names:
            yield data / f"{name}.heldout.jsonl.gz", "heldout", domain


def work_of(arguments: argparse.Namespace) -> Work:
    return Work(
        arguments.model.resolve().name, arguments.steps, arguments.batch, arguments.seq, arguments.r,
        arguments.learning_rate, arguments.heldout_tokens, gpu_name(),
    )  # fmt: skip


def run_config(arguments: argparse.Namespace, arm: str, seed: int, output: Path) -> RunConfig:
    sources = [{"path": str(file), "role": role, "domain": domain} for file, role, domain in texts(arguments.data)]
    return parse_config({
        "model": {
            "name": str(arguments.model), "compute_dtype": "bf16", "trained_dtype": "bf16", **ARMS[arm],
        },
        "adapter": {"r": arguments.r, "lora_alpha": SCALE * arguments.r**0.5, "use_rslora": True},
        "data": {"sources": sources, "max_length": arguments.seq, "holdout": 0.0},
        "training": {
            "output_dir": str(output), "max_steps": arguments.steps, "per_device_train_batch_size": arguments.batch,
            "gradient_accumulation_steps": 1, "learning_rate": arguments.learning_rate,
            "embedding_learning_rate": arguments.learning_rate / 10, "optim": "adamw_8bit", "seed": seed,
            "save_steps": 10 * arguments.steps, "logging_steps": 1, "vram": arguments.vram,
        },
        "evaluation": {"max_tokens": arguments.heldout_tokens},
    })  # fmt: skip


def refuse_other(arm: str, choices: Choices, on_gpu: bool) -> None:
    """
    Raises:
        RuntimeError: there is a GPU, and the step was not fused or its products not those of the arm.
    """
    if not on_gpu:
        return
    if not choices.fused:
        raise RuntimeError("its step was not fused: not what `steep train` is meant to be")
    wanted = ARMS[arm].get("fp8_products")
    if wanted and choices.fp8_products != wanted:
        raise RuntimeError(f"its products in fp8 were {choices.fp8_products}, and {wanted} are the arm's")


def one_run(arguments: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train, score, merge and score again; the line that says it."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary) / "run")
        config = run_config(arguments, arm, seed, folder.path)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trained = train_run(config)
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
        free_memory()
        choices = choices_of_run(folder)
        refuse_other(arm, choices, on_gpu)
        steps = folder.read_lines("metrics.jsonl")
        trained_s = time.perf_counter() - begun
        merged = scores_merged(config, folder, Path(temporary) / "merged")
    after = trained["after"]
    return {
        "arm": arm, "seed": seed, **dataclasses.asdict(work_of(arguments)),
        "embedding_learning_rate": config.training.embedding_learning_rate, "scale": SCALE,
        "tokens": steps[-1]["tokens"], "curve": [row["loss"] for row in steps],
        "before": columns(trained["before"], DOMAINS), "own": columns(after, DOMAINS),
        "merged": columns(merged, DOMAINS),
        "heldout": {score.domain: [score.documents, score.tokens] for score in after},
        "chosen": dataclasses.asdict(choices), "peak_allocated_gib": peak, "trained_s": trained_s,
        "seconds": time.perf_counter() - begun, "versions": versions(), "command": command(),
    }  # fmt: skip


def scores_merged(config: RunConfig, folder: RunFolder, output: Path) -> list[DomainScore]:
    """Of the run's adapter in the 16-bit original, as `steep export --base original` writes it, in bf16."""
    plan = plan_again(config, folder, Terminal(quiet=True))
    adapter = AdapterWeights(folder.final)
    original = as_folder(plan.resolved, plan.tokenizer)
    merger = Merger(original, adapter, base=plan.base, compute_dtype=DTYPES[plan.compute])
    merger.write(output, "original", tokenizer=folder.final)
    model = open_plainly(output, torch.bfloat16, attention(config.model.attn_implementation, plan.resolved.config))
    scores = evaluate(
        model, plan.corpus.heldout, max_length=config.data.max_length, stride=config.evaluation.stride,
        max_tokens=config.evaluation.max_tokens, step=config.training.max_steps,
    )  # fmt: skip
    del model
    free_memory()
    return scores


def done(out: Path, work: Work) -> set[tuple[str, int]]:
    """Arms and seeds whose lines of this work are in the file."""
    wanted = dataclasses.asdict(work)
    return {(row["arm"], row["seed"]) for row in lines_of(out) if wanted.items() <= row.items()}


def summarise(arguments: argparse.Namespace) -> None:
    """
    Raises:
        SystemExit: a file has no lines, or such as cannot be compared; without --docs always, with 1 where the bar is
            not shown to hold.
    """
    if empty := [str(file) for file in arguments.summary if not lines_of(file)]:
        raise SystemExit(f"--summary: {', '.join(empty)} has no lines.")
    files = {file.name: lines_of(file) for file in arguments.summary}
    print("\n\n".join(map(tell, files.values())))
    if not arguments.docs:
        sys.exit(not all(map(bar_holds, files.values())))
    DOCS.write_text(in_docs(DOCS.read_text(encoding="utf-8"), files), encoding="utf-8")
    RECIPE.write_text(in_recipe(RECIPE.read_text(encoding="utf-8"), files), encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    if arguments.summary:
        summarise(arguments)
        return
    refuse(arguments)
    out, work = arguments.out or results_file("bases"), work_of(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        tokenise_once([run_config(arguments, "bf16", 0, Path(temporary))])
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for arm in arguments.arms:
                if (arm, seed) in done(out, work):
                    print(f"{arm} seed {seed}: its line is there")
                    continue
                row = one_run(arguments, arm, seed)
                append(out, row)
                losses = (f"{domain} {row['own'][domain]['loss']:.4f}, merged {row['merged'][domain]['loss']:.4f}"
                          for domain in DOMAINS)  # fmt: skip
                print(f"{arm} seed {seed}: {'; '.join(losses)}; {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
