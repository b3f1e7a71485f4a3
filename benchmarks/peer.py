"""What transformers + PEFT + bitsandbytes alone need for a step: the yardstick for the main job.

    python benchmarks/peer.py --model FOLDER [--steps 20] [--batch 2] [--length 2048] [--r 256]

QLoRA as their documentation has it, everything in bf16: NF4 with double quantisation, rank-stabilised LoRA on all seven
linear layers, embed_tokens and lm_head trained, gradient checkpointing, scaled-dot-product attention (flash), 8-bit
AdamW, clipping at 1, random tokens, the loss read at each step. Prints one line of JSON: seconds of each step, their
median from the fifth on, and the peak of allocated memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--r", type=int, default=256)
    arguments = parser.parse_args()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    config = LoraConfig(
        r=arguments.r,
        lora_alpha=32,
        use_rslora=True,
        target_modules=LINEAR_LAYERS,
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=5e-5)
    generator = torch.Generator("cuda").manual_seed(0)
    seconds = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        tokens = torch.randint(
            model.config.vocab_size, (arguments.batch, arguments.length), generator=generator, device="cuda"
        )
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss).item()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "step_s": statistics.median(seconds[4:]),
        "step_s_all": [round(second, 4) for second in seconds],
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "trained": sum(parameter.numel() for parameter in trained),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
