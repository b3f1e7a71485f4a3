"""What a resumed run has to share with its beginning, and a branch with the run that it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steep.config import recorded_config
from steep.errors import UserError
from steep.model.resolve import read_tokenizer_folder
from steep.plan import Plan
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.training.branch import Branch, read_branch
from steep.vocabulary import refuse_other_words

# Fields that change neither what is computed nor which rows are trained when.
HARMLESS = {
    "data.cache_dir",
    *(f"training.{name}" for name in (
        "output_dir", "save_steps", "save_total_limit", "save_strategy", "logging_steps", "logging_first_step",
        "logging_strategy", "eval_steps", "eval_strategy", "eval_delay", "report_to", "run_name", "project",
        "log_level", "max_nonfinite_steps", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "torch_empty_cache_steps",
    )),
}  # fmt: skip

# What a branch may change beside these: the rates and their schedule, how long it is, and the text.
_BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
OWN_OF_A_BRANCH = {
    *(f"training.{name}" for name in (
        "learning_rate", "embedding_learning_rate", "loraplus_lr_ratio", "lr_scheduler_type", "lr_scheduler_kwargs",
        "warmup_steps", "warmup_lr_rate", "min_lr_rate", "decay_steps", "decay_type", "cooldown_steps",
        "stable_lr_rate", "max_steps", "num_train_epochs",
    )),
    *_BATCH,
}  # fmt: skip


def refuse_other_settings(folder: RunFolder, config: RunConfig) -> None:
    """Compare the run file with the run's own, before anything is loaded.

    Raises:
        UserError: there is no run, or a field differs that changes what is computed.
    """
    if not (folder / "run.yaml").is_file():
        raise UserError(
            "--resume",
            f"{folder.path} holds no run to go on with",
            "Start the run without --resume, or give its output_dir.",
        )
    folder.refuse_links("--resume")
    before = recorded_config(folder / "run.yaml", "--resume")
    if changed := _changed(before, config):
        raise UserError(
            "--resume", f"the run file differs from the run's: {'; '.join(changed)}", "Put it back, or start a new run."
        )


def streamed_commits(folder: RunFolder) -> dict[int, str]:
    """The commits of a run's streamed sources, by number: a data set may have moved on since the run began."""
    if not (folder / "plan.json").is_file():  # killed before it had written anything else
        return {}
    sources = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["data"]["sources"]
    return {index: source["revision"] for index, source in enumerate(sources) if source.get("streamed")}


def commits_of_parent(branch: Branch, config: RunConfig) -> dict[int, str]:
    """The same for a branch: its parent's, as long as its sources are the parent's."""
    parent = RunFolder(Path(branch.checkpoint).parent)
    before = recorded_config(parent / "run.yaml", "--branch")
    return streamed_commits(parent) if before.data.sources == config.data.sources else {}


def begun_tokenizer(config: RunConfig, folder: RunFolder | None, parent: Branch | None) -> Path | None:
    """The tokenizer with new tokens that a resumed run, or a branch's parent, has already; None if there is none.

    Raises:
        UserError: the file of new tokens says something else than when that tokenizer grew.
    """
    places = [] if folder is None else [folder.tokenizer]
    if parent is not None:
        places.append(RunFolder(Path(parent.checkpoint).parent).tokenizer)
    begun = next((place for place in places if place.is_dir()), None)
    words = config.model.new_tokens
    if begun is not None and isinstance(words, str) and Path(words).exists():  # else the tokenizer has them
        refuse_other_words(begun, words, "--branch" if folder is None else "--resume")
    return begun


def has_other_text(folder: RunFolder, plan: Plan) -> bool:
    """Whether the text, or how the tokenizer reads it, is not what a run recorded; False where it recorded nothing."""
    if not (folder / "plan.json").is_file():
        return False
    before = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return before["data"]["fingerprint"] != plan.corpus.fingerprint


def refuse_other_inputs(folder: RunFolder, plan: Plan) -> None:
    """Compare what files and machine made of the run file with what they made of it at the beginning.

    Raises:
        UserError: the text, the storage of the base or the dtype of the products is another.
    """
    if not (folder / "plan.json").is_file():  # killed before it had written anything else
        return
    before = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    _refuse_other_precision("--resume", before, plan.as_dict())
    if has_other_text(folder, plan):
        raise UserError(
            "--resume",
            "the text, or how the tokenizer reads it, is not what the run began with",
            "Put the files back as they were, or start a new run.",
        )


def begin_branch(checkpoint: str | Path, config: RunConfig) -> Branch:
    """The branch that begins at a checkpoint, its run file compared with that of the run that wrote it.

    Raises:
        UserError: it is no checkpoint of a run, or a field differs that a branch has to share with its parent.
    """
    branch = read_branch(checkpoint)
    parent = RunFolder(Path(branch.checkpoint).parent)
    if not (parent / "run.yaml").is_file():
        raise UserError(
            "--branch", f"{parent.path} is not the folder of a run", "Give the checkpoint where its run wrote it."
        )
    parent.refuse_links("--branch")
    before = recorded_config(parent / "run.yaml", "--branch")
    changed = _changed(before, config, lambda key: key in OWN_OF_A_BRANCH or key.startswith("data."))
    if changed:
        raise UserError(
            "--branch",
            f"the run file differs from that of {parent.path}: {'; '.join(changed)}",
            "Put it back: a branch may change the rates, their schedule, its length and the text.",
        )
    return branch


def refuse_unlike_parent(plan: Plan) -> None:
    """Compare what files and machine make of a branch's run file with what they made of its parent's.

    Raises:
        UserError: dtypes or the tokenizer differ, or the batch does while the rows go on.
    """
    branch = plan.branch
    assert branch is not None
    parent = RunFolder(Path(branch.checkpoint).parent)
    before, now = json.loads((parent / "plan.json").read_text(encoding="utf-8")), plan.as_dict()
    _refuse_other_precision("--branch", before, now)
    if read_tokenizer_folder(Path(branch.checkpoint), "--branch").get_vocab() != plan.tokenizer.get_vocab():
        raise UserError(
            "--branch", f"the tokenizer is not the one of {branch.checkpoint}", "Put the model's folder back."
        )
    if branch.fingerprint != plan.corpus.fingerprint:
        return
    old = recorded_config(parent / "run.yaml", "--branch")
    if changed := _changed(old, plan.config, lambda key: key not in _BATCH):
        raise UserError(
            "--branch",
            f"the place in the rows is counted in steps, and those of the parent had others: {'; '.join(changed)}",
            "Put it back; it may change with the text.",
        )


def branch_of(folder: RunFolder) -> Branch | None:
    """Where the run of a folder left its parent, if it is a branch."""
    if not (folder / "parent.json").is_file():
        return None
    return Branch(**json.loads((folder / "parent.json").read_text(encoding="utf-8")))


def _refuse_other_precision(field: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, what in (("base", "model.base"), ("compute_dtype", "model.compute_dtype")):
        if before[key] != now[key]:
            raise UserError(field, f"{what} was {before[key]} and is {now[key]} here", f"Set {what}: {before[key]}.")


def _changed(before: RunConfig, config: RunConfig, free: Callable[[str], bool] = lambda key: False) -> list[str]:
    """The fields that differ, as text, but those that are harmless or `free` to."""
    old, new = _flat(before), _flat(config)
    return [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in old | new
        if old.get(key) != new.get(key) and not free(key)
    ]


def _flat(config: RunConfig) -> dict[str, Any]:
    """What a resumed run has to share with its beginning, by field."""
    sections = {name: getattr(config, name).model_dump() for name in ("model", "adapter", "data", "training")}
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if f"{section}.{key}" not in HARMLESS
    }
