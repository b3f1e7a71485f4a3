"""The trackers of `report_to`: known, installed, and logged in to, before there is a model to wait for."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from steep.errors import UserError, did_you_mean

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
    """Check that Weights & Biases, if it is asked for, has a key or does without one. It would ask for it, or fail,
    when the model is loaded and training begins.

    Raises:
        UserError: it has none.
    """
    names = [given] if isinstance(given, str) else given
    if "wandb" not in names and not ("all" in names and "wandb" in get_available_reporting_integrations()):
        return
    settings = _wandb_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    switched_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
    if mode in ("offline", "disabled", "dryrun") or switched_off:
        return
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.get("api_key"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "https://api.wandb.ai")).hostname
    if host is None or not _in_netrc(host):
        raise UserError(
            _FIELD,
            f"wandb has no key for {host}",
            "Log in with: wandb login; or set WANDB_API_KEY, or WANDB_MODE=offline to keep its files here.",
        )


def _wandb_settings() -> dict[str, str]:
    """What `wandb offline`, `wandb login --host` and the like have written, the folder's own last."""
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([own, here], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        problem = f"the settings of wandb cannot be read: {str(error).splitlines()[0]}"
        raise UserError(_FIELD, problem, f"Mend {own} or {here}.") from error
    return dict(parser["default"]) if parser.has_section("default") else {}


def _in_netrc(host: str) -> bool:
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError) as error:
        raise UserError(_FIELD, f"{file}, where wandb keeps its key, cannot be read", "Mend it.") from error
