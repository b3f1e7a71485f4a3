"""Try an installed steep as a user would: a tiny model and corpus, then every command, from `steep doctor` on.

Run with the Python of the environment that the wheel was installed into, without extras, from a folder outside the
checkout. Everything is made here: the tests' builders are not part of the wheel. Where an extra is missing, steep has
to name it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

STEEP = str(Path(sys.executable).with_name("steep"))


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    animals, verbs, places = (
        ("fox", "owl", "cat", "bear", "hare"),
        ("sleeps", "runs", "waits"),
        ("hill", "lake", "barn"),
    )
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(120):
            words = (animals[number % 5], verbs[number % 3], places[number // 5 % 3], number)
            file.write(json.dumps({"text": "The {} {} near the {} on day {}. ".format(*words) * 4}) + "\n")


def write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def steep(*arguments: str | Path) -> None:
    command = [STEEP, *map(str, arguments)]
    print("$", "steep", *command[1:], flush=True)
    began = time.monotonic()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=300)
    print(f"  {time.monotonic() - began:.1f} s", flush=True)


def refused(*arguments: str | Path, says: str) -> None:
    """The command ends with one error line that holds `says`."""
    command = [STEEP, *map(str, arguments)]
    print("$", "steep", *command[1:], flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr
    print(f"  {lines[0]}", flush=True)


def import_everything() -> None:
    """Every file of the package came with the wheel, and no module needs an extra to be imported.

    Nor Triton, which a CPU build of torch comes without; only the kernels do.
    """
    files = [Path(str(file)) for file in metadata.files("steep") or [] if str(file).startswith("steep/")]
    assert {".css", ".j2", ".js"} <= {file.suffix for file in files}, "the report's page is not in the wheel"
    modules = [".".join(file.with_suffix("").parts) for file in files if file.suffix == ".py"]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    if find_spec("triton") is None:
        modules = [name for name in modules if not name.startswith("steep.kernels.")]
    for name in modules:
        import_module(name)
    print(f"{len(modules)} modules import", flush=True)


def open_adapter(final: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    trained = [name for name, tensor in model.named_parameters() if "lora_B" in name and tensor.abs().max() > 0]
    assert trained, f"no adapter in {final} left its starting point"
    ids = AutoTokenizer.from_pretrained(final)("The fox", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=ids).logits).all()
    print(f"{final.name}/ opens with PEFT; {len(trained)} adapters were trained", flush=True)


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["STEEP_CACHE"] = str(Path(scratch, "cache"))
        model, data, run_file = Path(scratch, "model"), Path(scratch, "data"), Path(scratch, "run.yaml")
        write_model(model)
        write_corpus(data)
        for package in ("gguf", "tensorboard", "vl_convert"):
            assert find_spec(package) is None, f"this is about an environment without {package}"
        import_everything()
        steep("doctor")
        steep("init", "--model", model, "--data", data, "-o", run_file)
        small = ["--data.max_length", "128", "--data.holdout", "0.1"]
        small += ["--training.rows_per_step", "2", "--training.max_steps", "4"]
        steep("plan", run_file, *small)
        steep("train", run_file, "--training.output_dir", "runs/smoke", *small)
        open_adapter(Path(scratch, "runs", "smoke", "final"))
        steep("eval", "runs/smoke")
        steep("generate", "runs/smoke", "The fox", "--max-new-tokens", "8")
        Path("model.gguf").write_bytes(b"GGUF")
        refused("plan", run_file, "--model.name", "model.gguf", says="pip install 'steep[gguf]'")
        refused("report", "runs/smoke", says="pip install 'steep[report]'")
        refused(
            "plan", run_file, *small, "--training.report_to", "tensorboard", says="pip install 'steep[tensorboard]'"
        )


if __name__ == "__main__":
    main()
