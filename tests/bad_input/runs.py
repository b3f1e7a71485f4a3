"""Finished runs that are damaged, or asked for what they cannot give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunRow:
    """A command on a finished run.

    Attributes:
        name: of the test.
        words: of the command; RUN is the run's folder, FOLDER the one around it.
        field: what the line names, behind ``error: ``.
        says: parts of the line.
        spoil: what is done to the run's folder.
    """

    name: str
    words: str
    field: str
    says: tuple[str, ...]
    spoil: Callable[[Path], object]


def run_row(
    name: str, words: str, field: str, *says: str, spoil: Callable[[Path], object] = lambda run: None
) -> RunRow:
    return RunRow(name, words, field, says, spoil)


def garbage(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(b"\xff{")


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def lines_of(name: str, line: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(line + b"\n")


def json_field(name: str, field: str, value: Any) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | {field: value}))


RUNS = [
    run_row("eval of nothing", "eval FOLDER/none", "run folder", "none holds no run", "output_dir"),
    run_row("generate of nothing", "generate FOLDER x", "run folder", "holds no run", "output_dir"),
    run_row("export of nothing", "export FOLDER/none -o FOLDER/out", "run folder", "holds no run", "output_dir"),
    run_row("report of nothing", "report FOLDER/none", "RUN", "holds no run", "output_dir"),
    *(
        run_row(
            f"{command.split(' ')[0]} of a run that goes on",
            command,
            "run folder",
            "is not finished",
            "Finish it with: steep train",
            spoil=lambda run: shutil.rmtree(run / "final"),
        )
        for command in ("eval RUN", "generate RUN x", "export RUN -o FOLDER/out")
    ),
    run_row(
        "eval of a run without a result and with a damaged run file",
        "eval RUN",
        "run folder",
        "run.yaml is damaged",
        spoil=lambda run: (shutil.rmtree(run / "final"), (run / "run.yaml").write_bytes(b"\xff\xfe")),
    ),
    run_row("an empty prompt", "generate RUN ", "prompt", "it is empty", "Write a word"),
    run_row("no tokens", "generate RUN x --max-new-tokens 0", "max_new_tokens", "0 is not positive", "at least 1"),
    run_row("no temperature", "generate RUN x --temperature nan", "temperature", "nan is not", "Use 0 for greedy"),
    run_row("export over a run", "export RUN -o RUN", "--output", "is not empty", "another folder"),
    run_row("export over a file", "export RUN -o RUN/run.yaml", "--output", "is a file", "Give a folder"),
    run_row("export to nothing known", "export RUN -o FOLDER/out --to onnx", "--to", "'onnx' is unknown", "gguf"),
    run_row("export over no base known", "export RUN -o FOLDER/out --base x", "--base", "'x' is unknown", "original"),
    run_row("upload to nobody", "export RUN -o FOLDER/out --push me", "--push", "'me' has no owner", "USER/NAME"),
    run_row("a report over a folder", "report RUN -o FOLDER", "-o", "is not the name of a page", ".html"),
    run_row("a report twice", "report RUN RUN", "RUN", "is given twice", "once"),
    run_row("a page and --watch", "report RUN --watch -o x.html", "-o", "does not go with --watch"),
    run_row("train over it", "train FILE", "training.output_dir", "holds another run", "--resume"),
    run_row("a branch into it", "train FILE --branch RUN/checkpoint-2", "training.output_dir", "holds another run"),
    run_row("a branch off its result", "train FILE --branch RUN/final", "--branch", "is no whole checkpoint"),
    run_row("resume with another rank", "train FILE --resume --adapter.r 4", "--resume", "adapter.r"),
    run_row("its result as a base", "plan FILE --model.name RUN/final", "model.name", "holds an adapter, not a model"),
    run_row(
        "a run inside its checkpoint", "plan FILE --training.output_dir RUN/final/x", "training.output_dir", "belongs"
    ),
    run_row("run.yaml for eval", "eval RUN", "run folder", "run.yaml is damaged", spoil=garbage("run.yaml")),
    run_row("run.yaml for report", "report RUN", "run folder", "run.yaml is damaged", spoil=garbage("run.yaml")),
    run_row("run.yaml is empty", "eval RUN", "run folder", "holds no sections", spoil=written("run.yaml", "")),
    run_row("plan.json for report", "report RUN", "run folder", "plan.json is damaged", spoil=garbage("plan.json")),
    run_row(
        "metrics for report", "report RUN", "run folder", "metrics.jsonl is damaged", spoil=garbage("metrics.jsonl")
    ),
    run_row("plan.json for resume", "train FILE --resume", "run folder", "is damaged", spoil=garbage("plan.json")),
    run_row("plan.json for eval", "eval RUN", "run folder", "it has no model", spoil=written("plan.json", '{"a": 1}')),
    run_row("metrics for resume", "train FILE --resume", "run folder", "is damaged", spoil=garbage("metrics.jsonl")),
    run_row("environment.json", "train FILE --resume", "run folder", "is damaged", spoil=garbage("environment.json")),
    run_row(
        "metrics without a step",
        "report RUN",
        "run folder",
        "metrics.jsonl is damaged: line 1: it has no step",
        spoil=written("metrics.jsonl", "5\n"),
    ),
    *(
        run_row(
            f"{name} {what} for resume", "train FILE --resume", "run folder", f"{name} is damaged: {says}", spoil=do
        )
        for name, what, says, do in (
            *((name, "garbage", "", garbage(name)) for name in ("incidents.jsonl", "changes.jsonl", "proof.json")),
            (
                "incidents.jsonl",
                "not UTF-8",
                "line 1: it is not UTF-8",
                lines_of("incidents.jsonl", b'{"step": "\xff"}'),
            ),
            ("incidents.jsonl", "a list", "line 1: it has no step", written("incidents.jsonl", "[1]\n")),
            ("incidents.jsonl", "a step of text", "line 1: it has no", written("incidents.jsonl", '{"step": "x"}\n')),
            ("skipped_steps.json", "cut off", "", written("skipped_steps.json", '{"steps": [{"step": 2, "ro')),
            ("skipped_steps.json", "a list", "it is []", written("skipped_steps.json", "[]")),
            (
                "skipped_steps.json",
                "without rows",
                "steps[0].rows is None",
                written("skipped_steps.json", '{"steps": [{"step": 2, "rows": null}]}'),
            ),
            (
                "changes.jsonl",
                "cut off",  # it is written as a whole
                "its last line is not whole",
                written("changes.jsonl", '{"step": 2, "field": "training.le'),
            ),
            ("parent.json", "an empty object", "it has no checkpoint", written("parent.json", "{}")),
            ("ledger.json", "deep", "it is nested too deeply", written("ledger.json", "[" * 100_000)),
        )
    ),
    *(
        run_row(
            f"{name} for report", "report RUN", "run folder", f"{name} is damaged: {says}", spoil=written(name, text)
        )
        for name, text, says in (
            ("ledger.json", "[]", "it is []"),
            ("ledger.json", '{"sources": 5}', "sources is 5, and not a valid list"),
            ("proof.json", '{"complete": NaN}', "it holds NaN"),
            ("plan.json", '{"model": "a", "base": "nf4", "compute_dtype": "fp32", "data": 5}', ""),
            ("evaluation.jsonl", '{"step": 1}\n', "line 1: it has no domain"),
            ("samples.jsonl", '{"step": 1, "prompt": 2}\n', "line 1: prompt is 2"),
            ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "line 1: loss is 'x'"),
            ("environment.json", '{"packages": 5}', ""),
            ("incidents.jsonl", '{"step": 1, "kind": 5}\n', "line 1: kind is 5"),
        )
    ),
    run_row(
        "a damaged adapter",
        "eval RUN",
        "run folder",
        "final/adapter_model.safetensors is damaged",
        spoil=garbage("final/adapter_model.safetensors"),
    ),
    run_row(
        "a damaged adapter_config",
        "eval RUN",
        "run folder",
        "final/adapter_config.json cannot be read",
        "Put it back",
        spoil=garbage("final/adapter_config.json"),
    ),
    *(
        run_row(
            f"an adapter whose {name} is {value!r}",
            command,
            "run folder",
            f"final/adapter_config.json is damaged: {name} cannot be {value!r}",
            spoil=json_field("final/adapter_config.json", name, value),
        )
        for command, name, value in [
            ("eval RUN", "r", "x"),
            ("generate RUN x", "r", 0),
            ("export RUN -o FOLDER/out", "lora_alpha", None),
            ("eval RUN", "target_modules", 5),
            ("eval RUN", "rank_pattern", [1]),
        ]
    ),
    run_row(
        "an adapter for other layers",
        "eval RUN",
        "run folder",
        "adapter_config.json",
        "does not fit the model",
        spoil=json_field("final/adapter_config.json", "target_modules", ["c_attn"]),
    ),
    run_row("half a character", "generate RUN \udcff", "prompt", "'\\udcff' holds half a character", "UTF-8"),
]
