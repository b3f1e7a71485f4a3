"""A QLoRA script as users have it, with one line more: `steep.install(model)`. It is fused, and right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForLanguageModeling

from steep.model.install import install
from steep.model.load import keep_4bit_layout
from steep.model.unwrap import unwrap
from steep.training.arguments import TrainingArguments
from steep.training.trainer import Trainer
from tests.tiny import documents, save_tiny

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(folder: Path, output: Path, kind: str, fused: bool) -> tuple[list[float], Any]:
    """The script. `kind`: transformers' own Trainer, or steep's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    keep_4bit_layout(model)  # of CPUs only
    model = prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model, config)
    if fused:
        install(model)
    texts = Dataset.from_dict({"text": documents("en", 40)})
    rows = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=96), remove_columns=["text"])
    trainer_class, arguments_class = {
        "transformers": (transformers.Trainer, transformers.TrainingArguments),
        "steep": (Trainer, TrainingArguments),
    }[kind]
    trainer = trainer_class(
        model=model,
        args=arguments_class(
            output_dir=str(output),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=True,
            gradient_checkpointing=True,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.filterwarnings("ignore")  # what the libraries say to such a script on a CPU
@pytest.mark.parametrize("kind", ["transformers", "steep"])
def test_the_standard_script_is_fused_and_right(kind: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", hidden_size=128)
    plain, _ = train(folder, tmp_path / "plain", kind, fused=False)
    fused, model = train(folder, tmp_path / "fused", kind, fused=True)
    assert unwrap(model).fused.calls == 8  # two micro-batches a step, none of them computed twice  # pyright: ignore
    assert len(plain) == len(fused) == 4
    assert fused[-1] < fused[0]
    # bf16's noise, which grows with the steps
    assert max(abs(a - b) / a for a, b in zip(plain, fused, strict=True)) < 5e-3, (plain, fused)
