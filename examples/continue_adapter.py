"""Go on from an adapter that PEFT made elsewhere: whatever its rank, its target modules, with embeddings or without.

    python examples/continue_adapter.py --model base/ --adapter someones-adapter/ --data corpus.jsonl --output runs/more

`PeftModel.from_pretrained(..., is_trainable=True)` brings the adapter back as it was; `steep.Trainer` trains what it
finds trainable there. The adapter keeps its own rank, scale and target modules. One without `modules_to_save` trains no
embeddings: then there is no rate to give them, and `embedding_learning_rate` is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import PeftModel

import steep
from steep.model.embeddings import embedding_parameter_names


def main(arguments: Sequence[str] | None = None) -> steep.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model that the adapter was made for")
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json")
    parser.add_argument("--data", required=True, help="file or folder of text")
    parser.add_argument("--output", default="runs/continued")
    parser.add_argument("--base", default="auto", help="as the adapter was trained; auto: nf4 of a 16-bit checkpoint")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--embedding-learning-rate", type=float, help="default: a tenth, where embeddings train")
    given = parser.parse_args(arguments)

    base, tokenizer = steep.load(given.model, base=given.base)
    model = PeftModel.from_pretrained(base, given.adapter, is_trainable=True)
    trainable, _ = model.get_nb_trainable_parameters()
    print(f"{trainable:,} values train, {len(embedding_parameter_names(model))} whole embeddings among them")

    corpus = steep.pack([{"path": given.data}], tokenizer, max_length=given.max_length)
    args = steep.TrainingArguments(
        output_dir=given.output,
        per_device_train_batch_size=2,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        embedding_learning_rate=given.embedding_learning_rate,
        warmup_steps=0.05,
        optim="adamw_8bit",
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_steps=given.steps,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = steep.Trainer(model=model, args=args, train_dataset=corpus, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{given.output}/final")
    return trainer


if __name__ == "__main__":
    main()
