"""Open the result of a run with plain transformers and PEFT, and let it write. steep is not imported.

    python examples/open_result.py --adapter runs/ko/final --prompt "모든 국민은"

`final/` is a PEFT adapter like any other: LoRA matrices, the trained embeddings, the tokenizer. Its
`adapter_config.json` names the base model. With `--four-bit` the base is opened as most runs train over it (NF4, double
quantised), in a quarter of the memory. After such a run this is also the more faithful of the two: the adapter has
learned to correct that quantisation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="the folder final/ of a finished run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model", help="base model; default: the one that the adapter names")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args(arguments)

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        given.model or str(PeftConfig.from_pretrained(given.adapter).base_model_name_or_path),
        dtype=dtype,
        quantization_config=quantization if given.four_bit else None,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    model = PeftModel.from_pretrained(base, given.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.adapter)

    prompt = tokenizer(given.prompt, return_tensors="pt")
    written = model.generate(
        **prompt.to(model.device),
        max_new_tokens=given.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
