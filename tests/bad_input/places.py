"""Places on the disk: of the run, of its checkpoints, of the cache."""

from __future__ import annotations

from tests.bad_input.damage import both, into, standing, text_folder
from tests.bad_input.table import in_order, row

PLACES = [
    row(
        "the output is a file",
        "training.output_dir",
        into("FOLDER/text.jsonl"),
        "text.jsonl is a file",
        "Give a folder",
    ),
    row(
        "the output is below a file", "training.output_dir", into("FOLDER/text.jsonl/run"), "is a file", "Give a folder"
    ),
    row("the output cannot be written", "training.output_dir", into("/proc/run"), "/proc cannot be written into"),
    row(
        "the output holds a run",
        "training.output_dir",
        standing("run/run.yaml"),
        "holds another run",
        "--resume",
        command="train",
    ),
    row(
        "the output holds something",
        "training.output_dir",
        standing("run/notes.txt"),
        "is not empty",
        "empty it",
        command="train",
    ),
    row(
        "the output is in a checkpoint",
        "training.output_dir",
        both(standing("old/run.yaml", "old/checkpoint-2/x"), into("FOLDER/old/checkpoint-2/run")),
        "belongs to that run",
    ),
    row(
        "the output is the text's",
        "training.output_dir",
        both(text_folder("a.txt"), into("FOLDER/texts")),
        "would become text",
        "outside",
    ),
    row(
        "the output is among the text",
        "training.output_dir",
        both(text_folder("a.txt"), into("FOLDER/texts/run")),
        "would become text",
    ),
    row(
        "the output has too long a name",
        "training.output_dir",
        into("FOLDER/" + "x" * 300),
        "longer than the 255 bytes",
    ),
    row(
        "the cache is a file",
        "data.cache_dir",
        in_order,
        "FOLDER/run.yaml cannot be written into",
        "Give a folder you may write",
        words=("--data.cache_dir", "FOLDER/run.yaml"),
    ),
    row(
        "no run to resume",
        "--resume",
        in_order,
        "holds no run to go on with",
        "without --resume",
        words=("--resume",),
        command="train",
    ),
    row(
        "no checkpoint to branch off",
        "--branch",
        in_order,
        "there is no folder",
        "checkpoint-9",
        words=("--branch", "checkpoint-9"),
        command="train",
    ),
    row(
        "a branch off a folder",
        "--branch",
        in_order,
        "is no whole checkpoint",
        "`steep train` wrote",
        words=("--branch", "FOLDER/model"),
        command="train",
    ),
    row(
        "resume and branch",
        "--branch",
        in_order,
        "--resume goes on with one",
        "Give one",
        words=("--branch", "x", "--resume"),
        command="train",
    ),
]
