"""A script of transformers and PEFT, in which steep changes two lines.

    python examples/two_lines.py --model HuggingFaceTB/SmolLM2-135M --data corpus.jsonl --output runs/two-lines

The two lines are marked. Everything else is what such a script looks like anyway: `load_dataset`, `get_peft_model`, a
collator of transformers. What comes with them: the embeddings train at a rate of their own; a step whose loss or
gradient is not finite is not applied; the run stops if a tensor that is meant to train does not; checkpoints hold no
pickle.

`corpus.jsonl` has a document in the field "text" of each line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from steep import Trainer, TrainingArguments  # line 1: they came from transformers


def main(arguments: Sequence[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder of a base model")
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--output", default="runs/two-lines")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step, in each process")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    given = parser.parse_args(arguments)

    set_seed(0)
    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16 if gpu else torch.float32)
    tied = model.config.tie_word_embeddings
    lora = LoraConfig(
        r=given.rank,
        use_rslora=True,
        target_modules="all-linear",
        modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],  # trained whole
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)

    texts = load_dataset("json", data_files=given.data, split="train")
    rows = texts.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=given.max_length),
        remove_columns=texts.column_names,
    )
    args = TrainingArguments(
        output_dir=given.output,
        per_device_train_batch_size=given.batch_size,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        embedding_learning_rate=given.learning_rate / 10,  # line 2: it is new
        optim="adamw_8bit",  # steep's rounds bf16 weights stochastically: at such rates plain rounding loses the update
        bf16=gpu,
        use_cpu=not gpu,  # under torchrun, transformers joins processes on a CPU only so
        logging_steps=1,
        save_steps=given.steps,
        report_to="none",
        dataloader_pin_memory=gpu,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{given.output}/final")
    return trainer


if __name__ == "__main__":
    main()
