"""The trackers of `report_to`: known, installed, and logged in to, before there is a model to wait for."""

from __future__ import annotations

from inspect import signature
from urllib.parse import urlsplit

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from steep.errors import UserError, did_you_mean
from steep.foreign import reason

_FIELD = "training.report_to"


def check_trackers(given: str | list[str]) -> None:
    """Check that each tracker is one that transformers knows, and is installed.

    Raises:
        UserError: one is not.
    """
    available = get_available_reporting_integrations()
    for name in [given] if isinstance(given, str) else given:
        if name in ("none", "all", *available):
            continue
        here = f"Installed here are: {', '.join(available) or 'none'}."
        if name in INTEGRATION_TO_CALLBACK:
            how = "pip install 'steep[tensorboard]'" if name == "tensorboard" else f"Install {name}"
            raise UserError(_FIELD, f"the package of {name} is not installed", f"{how}. {here}")
        remedy = f"{did_you_mean(name, INTEGRATION_TO_CALLBACK)} {here}".lstrip()
        raise UserError(_FIELD, f"{name!r} is unknown to transformers", remedy)


def check_login(given: str | list[str]) -> None:
    """Check that Weights & Biases, if it is asked for, has a key or does without one, as it says itself. It would ask
    for it, or fail, when the model is loaded and training begins.

    Raises:
        UserError: it has none, or one that cannot be.
    """
    names = [given] if isinstance(given, str) else given
    if "wandb" not in names and not ("all" in names and "wandb" in get_available_reporting_integrations()):
        return
    import wandb
    from wandb.errors import Error

    settings = wandb.setup().settings
    if wandb.run is not None or settings.mode in ("offline", "dryrun", "disabled"):
        return
    if "prompt" not in signature(wandb.login).parameters:  # an older one, which would ask the user here
        return
    remedy = "Log in with: wandb login; or set WANDB_API_KEY, or WANDB_MODE=offline to keep its files here."
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except Error as error:
        raise UserError(_FIELD, f"wandb cannot log in: {reason(error)}", remedy) from error
    if not has_key:
        raise UserError(_FIELD, f"wandb has no key for {urlsplit(settings.base_url).netloc}", remedy)
