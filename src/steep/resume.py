"""What a resumed run has to share with its beginning, and a branch with the run that it leaves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from steep import ranks
from steep.changes import (
    BATCH,
    LENGTHS,
    OWN_OF_A_BRANCH,
    SAME_RATES,
    Change,
    changeable,
    changes_between,
    check_allowed,
    judge_length,
    values_of,
    way_out,
    why_it_stays,
)
from steep.config import recorded_config
from steep.errors import UserError
from steep.manifest import read_manifest
from steep.model.adapter_start import START
from steep.model.load import BASES
from steep.model.new_rows import NEW_ROWS, read_new_rows
from steep.plan import Plan
from steep.run_folder import RunFolder, environment
from steep.schema import FORWARDS, RunConfig
from steep.settings import planned_steps
from steep.training.branch import Branch, read_branch
from steep.training.checkpoint import Checkpoint
from steep.training.observations import load_observations
from steep.training.proof import frozen_checksums, other_tensors
from steep.vocabulary import refuse_other_words

_NAMED = 5  # files that a message lists


def refuse_no_run(folder: RunFolder) -> None:
    """Check that there is a run to go on with.

    Raises:
        UserError: there is none, or it holds a link.
    """
    if not (folder / "run.yaml").is_file():
        raise UserError(
            "--resume",
            f"{folder.path.absolute()} holds no run to go on with",
            "Start the run without --resume, or give its output_dir, or its own run.yaml.",
        )
    folder.refuse_links("--resume")


def with_chosen_base(config: RunConfig, folder: RunFolder, field: str) -> RunConfig:
    """`config` with what `model.base: auto` was for the run of `folder` in its place, whatever it would be here today.
    As it is where a base is named, or none was chosen yet that is known here.

    A run file names what was chosen; where there was no choice it says `auto`, as all did once, and the plan names it.

    Args:
        field: at fault, if what was recorded is damaged.

    Raises:
        UserError: it is damaged.
    """
    if config.model.base != "auto":
        return config
    base = recorded_config(folder / "run.yaml", field).model.base
    if base == "auto":
        base = (_plan_of(folder) or {}).get("base")
    if base not in BASES:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"base": base})})


def with_chosen_forwards(config: RunConfig, folder: RunFolder, field: str) -> RunConfig:
    """The same for `training.rows_per_step`: `config` with the forwards that steps of the run of `folder` were cut
    into. A branch that goes on with other text is cut anew.

    Raises:
        UserError: what was recorded is damaged; the same rows go on, in more processes or fewer, or in steps of another
            number of them.
    """
    if (rows := config.training.rows_per_step) is None:
        return config
    before, plan = recorded_config(folder / "run.yaml", field), _plan_of(folder)
    if plan is None or (field == "--branch" and config.data != before.data):
        return config
    ranks.refuse_other_number(plan.get("processes", 1), field)
    if rows != plan["rows_per_step"]:
        raise UserError(
            field,
            f"training.rows_per_step is {rows:,}, and a step of the run has {plan['rows_per_step']:,}: the place in "
            "the text is counted in those",
            "Put it back, or start a new run.",
        )
    kept = {name: getattr(before.training, name) for name in FORWARDS}
    return config.model_copy(update={"training": config.training.model_copy(update={**kept, "rows_per_step": None})})


def with_choices(config: RunConfig, folder: RunFolder, field: str) -> RunConfig:
    """`with_chosen_base` and `with_chosen_forwards`."""
    return with_chosen_forwards(with_chosen_base(config, folder, field), folder, field)


def accept_changes(folder: RunFolder, config: RunConfig, done: int, allow: Collection[str] = ()) -> list[Change]:
    """Compare the run file with the run's own, before anything is loaded.

    Args:
        done: the step of the checkpoint that the run goes on from; 0 without one.
        allow: fields that may differ although they are not harmless.

    Returns:
        What differs and counts, and is accepted.

    Raises:
        UserError: a field differs that changes what is computed; the run would end before `done`; `allow` names what a
            run cannot change.
    """
    check_allowed(allow, config)
    before = with_chosen_base(recorded_config(folder / "run.yaml", "--resume"), folder, "--resume")
    found = changes_between(before, with_chosen_base(config, folder, "--resume"))
    if any(change.field in LENGTHS for change in found):
        found = _with_length(folder, found, before, config, done)
    refused = [change for change in found if not (change.harmless or change.field in allow)]
    if not refused:
        return found
    stay = [change.field for change in refused if not changeable(change.field)]
    if stay:
        reasons = "; ".join(f"{field} cannot change within a run: {why_it_stays(field)}" for field in stay)
        remedy = f"{way_out(stay)} ({reasons})"
    else:
        flags = " ".join(f"--allow {change.field}" for change in refused)
        remedy = f"Put it back, or change it from step {done + 1} on: {flags}"
    raise UserError("--resume", f"the run file differs from the run's: {'; '.join(map(str, refused))}", remedy)


def _with_length(
    folder: RunFolder, found: list[Change], before: RunConfig, config: RunConfig, done: int
) -> list[Change]:
    """`found`, with what another length means for the steps that are done.

    Raises:
        UserError: the run would end before `done`.
    """
    plan = _plan_of(folder)
    first, note = (plan or {}).get("first_step", 0), None
    if plan is not None and done > first:
        rows, steps = plan["data"]["rows"], planned_steps(config, plan["data"]["rows"])
        if first + steps < done:
            fields = [change for change in found if change.field in LENGTHS]
            raise UserError(
                "--resume",
                f"{done} steps are done already, and the run would end at step {first + steps} with "
                f"{'; '.join(map(str, fields))}",
                "Give at least as many steps as are done, or the run's own run.yaml, which has the settings that it "
                f"went on with: steep train {shlex.quote(str(folder / 'run.yaml'))} --resume",
            )
        branch = branch_of(folder)
        start = branch.rate_factor if branch else None
        note = judge_length(before, config, rows=rows, done=done - first, start=start)
    return [
        replace(change, harmless=note is None, note=note or SAME_RATES) if change.field in LENGTHS else change
        for change in found
    ]


def record_changes(folder: RunFolder, changes: Sequence[Change], config: RunConfig, done: int) -> None:
    """Write what changed into `changes.jsonl`, before the run file is written anew.

    A change that came after `done` had its steps lost, and counts from `done` on. One that the run was killed right
    after, so that its run file does not have it, never was.
    """
    before = values_of(config) | {change.field: change.old for change in changes}
    rows = folder.read_lines("changes.jsonl")
    last = {row["field"]: row for row in rows}
    kept = [
        {**row, "step": min(row["step"], done)}
        for row in rows
        if row is not last[row["field"]] or row["new"] == before.get(row["field"], row["new"])
    ]
    new = [{"step": done, "field": change.field, "old": change.old, "new": change.new} for change in changes]
    if rows or new:
        folder.write_text("changes.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *new]))


def changed_ground(folder: RunFolder) -> list[str]:
    """Versions and cards that are not those the run was on before: the same sums may come out in other bits."""
    before, now = folder.read_json("environment.json"), environment()
    if not before:
        return []
    pairs = [(name, before["packages"].get(name), version) for name, version in now["packages"].items()]
    pairs += [("the GPU", before["gpus"][:1], now["gpus"][:1])]
    return [f"{name}: {old} → {new}" for name, old, new in pairs if old != new]


def _plan_of(folder: RunFolder) -> dict[str, Any] | None:
    """What a run planned; None where it was killed before it had written that."""
    return folder.read_json("plan.json") or None


def streamed_commits(folder: RunFolder) -> dict[int, str]:
    """The commits of a run's streamed sources, by number: a data set may have moved on since the run began."""
    plan = _plan_of(folder)
    sources = plan["data"]["sources"] if plan else []
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


def begun_rows(plan: Plan, folder: RunFolder | None, found: Checkpoint | None) -> Path | None:
    """The file with the rows that the new tokens of a resumed run, or of a branch's parent, began with; None where they
    are still to be made, and without new tokens.

    Args:
        folder: of the run that is resumed.
        found: the checkpoint that it goes on from, if there is one.

    Raises:
        UserError: it is not there, damaged, or not the one that the checkpoint has.
    """
    if plan.vocabulary is None or (folder is None and plan.branch is None):
        return None
    checkpoint = None if found is None else found.path
    if folder is None:
        assert plan.branch is not None
        checkpoint = Path(plan.branch.checkpoint)
        folder = RunFolder(checkpoint.parent)
    file = folder.tokenizer / NEW_ROWS
    if checkpoint is None and not file.exists():
        return None  # nothing was trained from them
    read_new_rows(file)
    if checkpoint is not None:
        is_known = NEW_ROWS in read_manifest(checkpoint).files
        if not is_known or file.read_bytes() != (checkpoint / NEW_ROWS).read_bytes():
            problem = f"{file} is not the {NEW_ROWS} of {checkpoint}"
            raise UserError("run folder", problem, "Put back that of the checkpoint, if the two are of one run.")
    return file


def has_other_text(folder: RunFolder, plan: Plan) -> bool:
    """Whether the text, or how the tokenizer reads it, is not what a run recorded; False where it recorded nothing."""
    before = _plan_of(folder)
    return before is not None and before["data"]["fingerprint"] != plan.corpus.fingerprint


def refuse_other_inputs(folder: RunFolder, plan: Plan) -> None:
    """Compare what files and machine made of the run file with what they made of it at the beginning.

    Raises:
        UserError: the text, the storage of the base or the dtype of the products is another.
    """
    before = _plan_of(folder)
    if before is None:
        return
    _refuse_other_precision("--resume", before, plan.as_dict())
    ranks.refuse_other_number(before.get("processes", 1), "--resume")
    if has_other_text(folder, plan):
        other = _other_sources(before["data"]["sources"], plan.corpus.statistics["sources"])
        raise UserError(
            "--resume",
            f"the text is not what the run began with: {'; '.join(other)}",
            "Put it back as it was, or start a new run; a branch may have other text: --branch checkpoint-N.",
        )


def _other_sources(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Which sources of two plans have other text, and by which of their files."""
    found = []
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        if old.get("digest") == new["digest"]:
            continue
        files, others = old.get("file_digests"), new["file_digests"]
        if not files or not others:  # a hub data set, or more files than a plan names
            what = "its documents are others"
        else:
            names = [
                f"{name} {'is gone' if name not in others else 'is new' if name not in files else 'has changed'}"
                for name in sorted(files | others)
                if files.get(name) != others.get(name)
            ]
            more = f" and {len(names) - _NAMED} more files" if len(names) > _NAMED else ""
            what = ", ".join(names[:_NAMED]) + more or "the tokenizer reads the same files otherwise"
        found.append(f"data.sources[{index}] ({new['path'] or new['name']}): {what}")
    return found or ["the same documents stand in other rows"]


def refuse_other_base(model: Any, checkpoint: Path, field: str) -> None:
    """Compare the frozen weights with those that a checkpoint was trained over: the base's files may have changed, or
    lie elsewhere now.

    Raises:
        UserError: they differ.
    """
    saved = load_observations(checkpoint, field)["proof"]["frozen"]
    # PiSSA's frozen start is no part of the base: it comes from the checkpoint, and is not loaded yet.
    saved, here = (
        {name: digest for name, digest in checksums.items() if f".{START}." not in name}
        for checksums in (saved, frozen_checksums(model))
    )
    if other := other_tensors(saved, here):
        problem = f"model.name is another base than the one below {checkpoint}: {other}"
        raise UserError(field, problem, "Give the same weights, or start a new run.")


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
    before = with_chosen_base(recorded_config(parent / "run.yaml", "--branch"), parent, "--branch")
    changed = changes_between(
        before,
        with_chosen_base(config, parent, "--branch"),
        lambda key: key in OWN_OF_A_BRANCH or key.startswith(("data.", "evaluation.")),
    )
    if changed:
        raise UserError(
            "--branch",
            f"the run file differs from that of {parent.path}: {'; '.join(map(str, changed))}",
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
    before = _plan_of(parent)
    if before is None:
        raise UserError("--branch", f"{parent.path} has no plan.json", "Give a checkpoint where its run wrote it.")
    _refuse_other_precision("--branch", before, plan.as_dict())
    if branch.tokenizer().get_vocab() != plan.tokenizer.get_vocab():
        raise UserError(
            "--branch", f"the tokenizer is not the one of {branch.checkpoint}", "Put the model's folder back."
        )
    if branch.fingerprint != plan.corpus.fingerprint:
        return
    old = recorded_config(parent / "run.yaml", "--branch")
    if changed := changes_between(old, plan.config, lambda key: key not in BATCH):
        raise UserError(
            "--branch",
            "the place in the rows is counted in steps, and those of the parent had others: "
            + "; ".join(map(str, changed)),
            "Put it back; it may change with the text.",
        )


def branch_of(folder: RunFolder) -> Branch | None:
    """Where the run of a folder left its parent, if it is a branch."""
    tree = folder.read_json("parent.json")
    return Branch(**{field.name: tree[field.name] for field in fields(Branch)}) if tree else None


def _refuse_other_precision(field: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, what in (("base", "model.base"), ("compute_dtype", "model.compute_dtype")):
        if before[key] != now[key]:
            raise UserError(field, f"{what} was {before[key]} and is {now[key]} here", f"Set {what}: {before[key]}.")
