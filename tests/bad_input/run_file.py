"""Run files and words of a command."""

from __future__ import annotations

from tests.bad_input.damage import raw_file, replaced, setting
from tests.bad_input.table import in_order, row, words

RUN_FILE = [
    row("no run file", "run file", in_order, "none.yaml does not exist", "steep init", words=("FOLDER/none.yaml",)),
    row("a folder", "run file", lambda scene: scene.file.mkdir(), "is no file", "steep init"),
    row("empty", "run file", raw_file(""), "holds no sections", "steep init"),
    row("a list", "run file", raw_file("- a\n"), "holds no sections", "steep init"),
    row("not UTF-8", "run file", raw_file(b"model: {name: \xff}"), "is not UTF-8 at byte 14", "Save it as UTF-8"),
    row("UTF-16", "run file", raw_file("model: {}".encode("utf-16")), "is not UTF-8 at byte 0"),
    row("NUL", "run file", raw_file(b"model:\n  name: \x00\n"), "line 2", "U+0000 is not allowed"),
    row("a tab", "run file", raw_file("model:\n\tname: x\n"), "in line 2", "'\\t'", "Mend that line"),
    row("open bracket", "run file", raw_file("model: {name: a\n"), "is not valid YAML in line 2"),
    row("deep", "run file", raw_file("a: " + "[" * 5000), "nested too deeply"),
    row(
        "a key twice", "run file", replaced("base: fp32", "base: fp32\n  base: nf4"), "'base' stands twice in a section"
    ),
    row("a list as key", "run file", raw_file("? [a]\n: b\n"), "a key is a list"),
    row("no such alias", "run file", raw_file("model: *zz\n"), "undefined alias 'zz'"),
    row("no date", "run file", replaced("fp32", "2020-13-45"), "'2020-13-45' is no timestamp"),
    row("no int", "run file", replaced("r: 8", "r: !!int many"), "'many' is no int"),
    row("5,000 digits", "run file", replaced("r: 8", f"r: {'9' * 5000}"), "is no int"),
    row(
        "a tag that runs code",
        "run file",
        replaced("base: fp32", "base: !!python/object/apply:os.mkdir ['FOLDER/planted']"),
        "could not determine a constructor for the tag",
        "os.mkdir",
    ),
    row(
        "an endless list of aliases",
        "evaluation.prompts[0]",
        replaced(
            "adapter:",
            "".join(
                (
                    f"{name}: &{name} [{', '.join(['*' + before if before else 'x'] * 9)}]\n"
                    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
                )
            )
            + "evaluation: {prompts: *i}\nadapter:",
        ),
        "is not valid",
        "Give a text",
    ),
    row("an unknown section", "modle", setting("modle", {}), "not a field", "Did you mean 'model'?"),
    row("an unknown field", "data.max_lenght", setting("data.max_lenght", 64), "Did you mean 'max_length'?"),
    row("a section that is none", "data", setting("data", None), "None is not valid", "Write a section"),
    row("a missing field", "training.output_dir", setting("training", {}), "it is missing", "Add it"),
    words("--adapter.rank 4", "adapter.rank", "not a field", "lora_alpha"),
    words("--adapter.r", "--adapter.r", "its value is missing", "--adapter.r VALUE"),
    words("--adapter..r 4", "--adapter..r", "a part of the field's name is missing"),
    words("--adapter.r [1", "--adapter.r", "'[1' is not valid YAML", "close its brackets"),
    words("--adapter.r !!python/name:os.system", "--adapter.r", "is not valid YAML"),
    words("--data.sources.7.path x", "data.sources.7", "there are 1 of them", "Give a number from 0"),
    words("--resum", "--resum", "no option of this command", "--section.field value"),
    words("more", "more", "no option of this command"),
]
