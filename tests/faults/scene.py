"""What the runs of these tests stand on: a model, three texts and run files; small, with every kind of state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import documents, save_tiny

# Each covers what it can of: LoRA and QLoRA, both optimizers, new tokens, a best so far. Those with 8-bit in their name
# have 8-bit states, of tensors of 4,096 elements on. All have dropout, two epochs of 10 steps, mixed sources, three
# micro-batches a step; checkpoints between two log lines and at one, with an evaluation (step 12) and without.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"training": {"optim": "adamw_torch"}},
    "lora 8-bit": {"training": {"optim": "adamw_8bit"}},
    # Its rate grows until the loss does: the best checkpoint is an early one, which has to stay.
    "qlora": {
        "model": {"base": "nf4"},
        "training": {
            "optim": "adamw_torch",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 19,
            "eval_steps": 2,
            "metric_for_best_model": "heldout_bits_per_byte",
        },
    },
    "qlora 8-bit": {"model": {"base": "nf4", "new_tokens": {"auto": 8}}, "training": {"optim": "adamw_8bit"}},
}


class Scene:
    """A model and texts in a folder, which runs only read.

    Args:
        folder: where to write them.
        hidden_size: of the model; at 256 a checkpoint has megabytes, so that writing it takes a while.
        long: whether the held-out text is long, so that tokenising it takes a while.
    """

    def __init__(self, folder: Path, *, hidden_size: int = 64, long: bool = False) -> None:
        self.folder = folder
        self.model = save_tiny("llama", folder / "model", hidden_size=hidden_size, intermediate_size=2 * hidden_size)
        for name, language, first, count in (("ko", "ko", 0, 90), ("en", "en", 0, 60), ("heldout", "ko", 200, 400)):
            texts = documents(language, first + count)[first:]
            if name == "heldout":
                others = documents("en", 600)[200:]
                texts = [" ".join(texts[n : n + 20] + others[n : n + 20]) for n in range(380 if long else 20)]
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)

    def write(self, place: Path, kind: str = "lora", **sections: dict[str, Any]) -> Path:
        """Write the run file of a run in ``place/run``; `sections` override single fields."""
        given: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.model), "base": "fp32"},
            "adapter": {"r": 64, "lora_dropout": 0.1},
            "data": {
                "sources": [
                    {"path": str(self.folder / "ko.jsonl")},
                    {"path": str(self.folder / "en.jsonl"), "role": "replay"},
                    {"path": str(self.folder / "heldout.jsonl"), "role": "heldout"},
                ],
                "max_length": 128,
                "replay_share": 0.25,
                "holdout": 0,
            },
            "training": {
                "output_dir": str(place / "run"),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "learning_rate": 1e-3,
                "logging_steps": 3,
                "save_steps": 4,
                "eval_steps": 6,
            },
            "evaluation": {"prompts": ["강물이"], "max_new_tokens": 4, "max_tokens": 2000},
        }
        tree = {
            name: {**section, **KINDS[kind].get(name, {}), **sections.get(name, {})} for name, section in given.items()
        }
        file = place / "file.yaml"
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return file
