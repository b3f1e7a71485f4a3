"""Run folders with made-up figures, of any length, written in milliseconds."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

DOMAINS = {"korean": ("train", 2.56, 1.68), "english": ("replay", 1.03, 1.05), "code": ("heldout", 0.80, 0.80)}
PROMPTS = {"모든 국민은": ("어면조역은 어면", "법률이 정하는 바에 의하여"), "The river": ("runs", "runs to the sea")}


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    done: int | None = None,
    every: int = 1,
    eval_every: int = 20,
    domains: Mapping[str, tuple[str, float, float]] = DOMAINS,
    prompts: Mapping[str, tuple[str, str]] = PROMPTS,
    learning_rate: float = 5e-5,
    seed: int = 0,
) -> Path:
    """Write the folder of a run of `steps` steps of which `done` are done (default: all, and then it is finished).

    Args:
        every, eval_every: steps between two lines of metrics, and of held-out scores.
        domains: role, bits per byte of the base model, bits per byte at the end.
    """
    done = steps if done is None else done
    finished, chance = done == steps, random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"name": "somebody/tiny-7b", "base": "nf4"},
        "data": {"sources": [{"path": f"corpus/{name}", "role": role} for name, (role, _, _) in domains.items()]},
        "training": {"output_dir": str(folder), "max_steps": steps, "learning_rate": learning_rate, "seed": seed},
        "evaluation": {"prompts": list(prompts)},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _write(folder / "plan.json", _plan(steps, learning_rate))
    _write(folder / "environment.json", ENVIRONMENT)
    rows = []
    for step in range(every, done + 1, every):
        warm = min(1.0, step / max(1, steps // 20))
        rate = warm * learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        rows.append(
            {
                "step": step,
                "loss": 1.9 + 0.9 * math.exp(-6 * step / steps) + chance.gauss(0, 0.06),
                "grad_norm": 0.6 + chance.expovariate(8),
                "learning_rate": rate,
                "embedding_learning_rate": rate / 10,
                "learning_rate_adapters_a": rate,
                "learning_rate_adapters_b": rate,
                "learning_rate_embeddings": rate / 10,
                "tokens": step * 32_640,
                "tokens_per_second": 11_800 + chance.gauss(0, 150),
                "peak_memory_bytes": 20_200_000_000 + min(step, 50) * 4_000_000,
                "steps_not_finite": 0,
                "epoch": step / steps,
            }
        )
    _write_lines(folder / "metrics.jsonl", rows)
    measured = [*range(0, done, eval_every), *([steps] if finished else [])]
    _write_lines(folder / "evaluation.jsonl", [row for step in measured for row in _scores(step, steps, domains)])
    _write_lines(
        folder / "samples.jsonl",
        [
            {"step": step, "prompt": prompt, "completion": text}
            for step, index in [(0, 0), *([(steps, 1)] if finished else [])]
            for prompt, text in ((prompt, texts[index]) for prompt, texts in prompts.items())
        ],
    )
    if finished:
        _write(folder / "ledger.json", _ledger(domains))
        _write(folder / "proof.json", _proof(steps, learning_rate))
        (folder / "final").mkdir(exist_ok=True)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file."""
    _write(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def _write(file: Path, tree: Any) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_lines(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _scores(step: int, steps: int, domains: Mapping[str, tuple[str, float, float]]) -> list[dict[str, Any]]:
    shares = {name: (1 - math.exp(-5 * step / steps)) / (1 - math.exp(-5)) for name in domains}
    bits = {name: base + (end - base) * shares[name] for name, (_, base, end) in domains.items()}
    return [
        {
            "step": step,
            "domain": name,
            "role": domains[name][0],
            "loss": value * 1.2,
            "perplexity": math.exp(value * 1.2),
            "bits_per_byte": value,
            "tokens": 48_000,
            "bytes": 120_000,
            "documents": 60,
        }
        for name, value in bits.items()
    ]


def _plan(steps: int, learning_rate: float) -> dict[str, Any]:
    return {
        "model": "somebody/tiny-7b",
        "base": "nf4",
        "compute_dtype": "bf16",
        "trained_dtype": "bf16",
        "parameters": {"frozen": 7_240_000_000, "adapters": 671_000_000, "trained_embeddings": 262_000_000}
        | {"trained": 933_000_000},
        "data": {
            "fingerprint": "f1",
            "sources": [],
            "rows": 16 * steps,
            "max_length": 2048,
            "mixing": {"replay_share": 0.25, "replay_share_achieved": 0.249},
        },
        "steps": steps,
        "rows_per_step": 16,
        "epochs": 1.0,
        "learning_rate": learning_rate,
        "embedding_learning_rate": learning_rate / 10,
        "memory_bytes": {
            "frozen linear weights": 3_900_000_000,
            "frozen embeddings and norms": 520_000_000,
            "adapters": 1_340_000_000,
            "trained embeddings": 524_000_000,
            "optimizer states": 1_900_000_000,
            "gradients": 1_870_000_000,
            "activations": 6_200_000_000,
            "logits and loss": 5_100_000_000,
            "total": 19_800_000_000,
        },
        "fragmentation": {"bytes": 1_700_000_000, "left_bytes": 8_500_000_000},
        "host_bytes": {"copy of a checkpoint": 3_500_000_000},
        "disk_bytes": {"checkpoints": 7_000_000_000, "final": 1_900_000_000, "total": 8_900_000_000},
        "warnings": ["the tokenizer spends 1.84 tokens a character on korean: rows hold little text."],
    }


ENVIRONMENT = {
    "python": "3.12.4",
    "platform": "Linux-6.8.0-x86_64-with-glibc2.39",
    "cpus": 16,
    "gpus": ["NVIDIA H100 80GB HBM3"],
    "cuda": "12.8",
    "packages": {"steep": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
}


def _ledger(domains: Mapping[str, tuple[str, float, float]]) -> dict[str, Any]:
    sources = []
    for number, (name, (role, _, _)) in enumerate(domains.items(), 1):
        held_only = role == "heldout"
        documents = {"read": 1000 * number, "duplicates": 30, "held_out": 10, "too_short": 2, "not_reached": 60}
        if held_only:
            documents |= {"duplicates": 0, "held_out": 1000 * number, "too_short": 0, "not_reached": 0}
        documents["trained"] = documents["read"] - sum(count for key, count in documents.items() if key != "read")
        tokens = {key: 1_234 * count for key, count in documents.items()}
        sources.append({"name": f"{name}.jsonl", "domain": name, "role": role, "path": f"corpus/{name}"})
        sources[-1] |= {"documents": documents, "tokens": tokens}
    return {
        "sources": sources,
        "rows": 960,
        "max_length": 2048,
        "targets": 1_900_000,
        "targets_reached": 1_850_000,
        "targets_trained": 1_850_000,
        "rows_trained": 930,
        "rows_refused": 0,
        "epochs": 0.97,
        "adds_up": True,
        "problems": [],
    }


def _proof(steps: int, learning_rate: float) -> dict[str, Any]:
    records = {
        f"model.layers.{layer}.{module}.lora_{side}.weight": ("adapters_" + side.lower(), learning_rate)
        for layer in range(8)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for side in "AB"
    } | {f"model.{name}.weight": ("embeddings", learning_rate / 10) for name in ("embed_tokens", "lm_head")}
    return {
        "complete": True,
        "trained": {
            name: {
                "group": group,
                "learning_rate": rate,
                "updates": steps,
                "nonzero_gradient": True,
                "elements": 1_048_576,
                "elements_checked": 16_384,
                "changed_share": 0.97 if group == "embeddings" else 1.0,
                "trained": True,
            }
            for name, (group, rate) in records.items()
        },
        "frozen_tensors": 291,
        "frozen_changed": [],
        "ok": True,
    }
