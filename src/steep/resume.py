"""What a resumed run has to share with its beginning."""

from __future__ import annotations

import json
from typing import Any

import yaml

from steep.config import RunConfig, parse_config
from steep.errors import UserError
from steep.plan import Plan
from steep.run_folder import RunFolder

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
    before = parse_config(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")))
    old, new = _flat(before), _flat(config)
    changed = [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]
    if changed:
        raise UserError(
            "--resume", f"the run file differs from the run's: {'; '.join(changed)}", "Put it back, or start a new run."
        )


def refuse_other_inputs(folder: RunFolder, plan: Plan) -> None:
    """Compare what files and machine made of the run file with what they made of it at the beginning.

    Raises:
        UserError: the text, the storage of the base or the dtype of the products is another.
    """
    if not (folder / "plan.json").is_file():  # killed before it had written anything else
        return
    before, now = json.loads((folder / "plan.json").read_text(encoding="utf-8")), plan.as_dict()
    for key, what in (("base", "model.base"), ("compute_dtype", "model.compute_dtype")):
        if before[key] != now[key]:
            raise UserError(
                "--resume", f"{what} was {before[key]} and is {now[key]} here", f"Set {what}: {before[key]}."
            )
    if before["data"]["fingerprint"] != now["data"]["fingerprint"]:
        raise UserError(
            "--resume",
            "the text, or how the tokenizer reads it, is not what the run began with",
            "Put the files back as they were, or start a new run.",
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    """What a resumed run has to share with its beginning, by field."""
    sections = {name: getattr(config, name).model_dump() for name in ("model", "adapter", "data", "training")}
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if f"{section}.{key}" not in HARMLESS
    }
