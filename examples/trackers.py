"""TensorBoard and Weights & Biases: one field says where the figures of a run go.

    python examples/trackers.py --model base/ --data corpus/ --tracker tensorboard
    tensorboard --logdir runs/tracked

    WANDB_MODE=offline WANDB_DIR=runs python examples/trackers.py --model base/ --data corpus/ --tracker wandb
    wandb sync runs/wandb/offline-run-*      # where there is a network, if at all

The trackers are those of transformers, by its own name `report_to`: in the run file (`--how run-file`), or in
`TrainingArguments` (`--how arguments`). Either way they get the loss, the rates of adapters and embeddings, tokens a
second and peak memory of every logged step, and bits per byte of the held-out text by domain, step 0 included.
TensorBoard's files go into the run folder, those of Weights & Biases where its own settings say (`WANDB_DIR`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import yaml

import steep
from steep.config import parse_config

RUN_FILE = """\
model:
  name: "{model}"
  base: {base}
adapter:
  r: {rank}
data:
  sources:
    - {{path: "{data}", domain: text}}
  max_length: {max_length}
  holdout: 0.1
training:
  output_dir: "{output}"
  max_steps: {steps}
  gradient_accumulation_steps: 1
  report_to: {tracker}  # this is the line
"""


def by_run_file(given: argparse.Namespace) -> None:
    """As `steep train` does it."""
    steep.train_run(parse_config(yaml.safe_load(RUN_FILE.format(**vars(given)))))


def by_arguments(given: argparse.Namespace) -> None:
    """As a script does it."""
    model, tokenizer = steep.load(given.model, base=given.base)
    model = steep.add_adapters(model, r=given.rank)
    corpus = steep.pack([{"path": given.data, "domain": "text"}], tokenizer, max_length=given.max_length, holdout=0.1)
    args = steep.TrainingArguments(
        output_dir=given.output,
        max_steps=given.steps,
        per_device_train_batch_size=2,
        optim="adamw_8bit",
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_steps=given.steps,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=given.tracker,  # this is the line
    )
    trainer = steep.Trainer(model=model, args=args, train_dataset=corpus, processing_class=tokenizer)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder of a base model")
    parser.add_argument("--data", required=True, help="file or folder of text")
    parser.add_argument("--output", default="runs/tracked")
    parser.add_argument("--tracker", choices=["tensorboard", "wandb"], default="tensorboard")
    parser.add_argument("--how", choices=["run-file", "arguments"], default="run-file")
    parser.add_argument("--base", default="auto", help="auto: nf4 of a 16-bit checkpoint; bf16, fp8 ...")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    given = parser.parse_args(arguments)
    (by_run_file if given.how == "run-file" else by_arguments)(given)


if __name__ == "__main__":
    main()
