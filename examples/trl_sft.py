"""TRL's SFTTrainer on a model that steep loaded and put adapters on: plain objects go into other people's trainers.

    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --data corpus.jsonl --output runs/trl

Three things to know:

- Embeddings need a rate of their own, and SFTConfig has no field for it. A transformers Trainer takes an optimizer, so
  one with steep's parameter groups is handed over.
- TRL turns everything that trains over a 4-bit base into bf16. At the rates of continued pretraining, plain rounding
  loses most of an update there; steep's 8-bit AdamW, the optimizer below, rounds stochastically.
- TRL packs with `bfd`, which cuts off what does not fit into a row; `bfd_split` keeps all text. Packed documents do not
  see each other: TRL gives positions that restart and no attention mask, and passes `use_cache=False`.

What TRL does not do: the proof, the ledger, checkpoints without pickle, bits per byte by domain. `steep.Trainer` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import steep
from steep.training.adamw8bit import AdamW8bit
from steep.training.groups import parameter_groups


def main(arguments: Sequence[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder of a base model")
    parser.add_argument("--data", required=True, help="a .jsonl file with a document in the field text of each line")
    parser.add_argument("--output", default="runs/trl")
    parser.add_argument("--base", default="auto", help="auto: nf4 of a 16-bit checkpoint; bf16, fp8 ...")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    given = parser.parse_args(arguments)

    gpu = torch.cuda.is_available()
    model, tokenizer = steep.load(given.model, base=given.base)
    model = steep.add_adapters(model, r=given.rank)

    rates = steep.TrainingArguments(
        output_dir=given.output,
        learning_rate=given.learning_rate,
        embedding_learning_rate=given.learning_rate / 10,
    )
    optimizer = AdamW8bit(parameter_groups(model, rates, decayed=()))
    args = SFTConfig(
        output_dir=given.output,
        max_length=given.max_length,
        packing=True,
        packing_strategy="bfd_split",
        per_device_train_batch_size=2,
        max_steps=given.steps,
        bf16=gpu,
        gradient_checkpointing=gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=gpu,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=load_dataset("json", data_files=given.data, split="train").select_columns(["text"]),
        processing_class=tokenizer,
        optimizers=(optimizer, None),  # the schedule is SFTConfig's: one factor for the rates of all groups
    )
    trainer.train()
    trainer.save_model(f"{given.output}/final")
    return trainer


if __name__ == "__main__":
    main()
