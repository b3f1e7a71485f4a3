"""A finished folder onto the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from steep.errors import RunError, UserError

_NO_MODEL = {".gitattributes", "README.md"}  # what a repository is begun with on the hub's page
_PUBLIC = "that was there before and is public: everybody can read it"


def check_push(name: str, field: str = "--push") -> None:
    """Find out, without a network, what would make `push` fail after hours of work.

    Raises:
        UserError: it is no USER/NAME, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(field, str(error).splitlines()[0], "Give USER/NAME, such as ada/mistral-7b-ko.") from error
    if name.count("/") != 1:
        raise UserError(field, f"{name!r} has no owner", "Give USER/NAME, such as ada/mistral-7b-ko.")
    if get_token() is None:
        raise UserError(
            field,
            "there is no token of the Hugging Face hub on this machine",
            "Log in with a token that may write: hf auth login (or set HF_TOKEN).",
        )


def push(folder: Path, name: str, say: Callable[[str], None], api: Any = None) -> str:
    """Upload a folder as the model `name`, which is made if need be, private.

    Args:
        say: is told where the upload goes, and who can see it there.
        api: a `huggingface_hub.HfApi`.

    Returns:
        Its address.

    Raises:
        RunError: `name` holds a model already, or the hub refuses; the folder stays.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        there = api.model_info(name)
        held = sorted({file.rfilename for file in there.siblings or ()} - _NO_MODEL)
        if held:
            # An upload takes no file away: beside another's adapter_config.json or shards it would open as neither.
            raise RunError(
                f"{name} on the hub holds files already ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''}), and "
                f"would become a mixture of two models. The result is in {folder}: upload it under another name, "
                f"hf upload USER/NAME {folder}, or delete what is there first."
            )
        say(f"uploading to {name} ({'private until you open it on its page' if there.private else _PUBLIC})")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from steep")
    except (HfHubHTTPError, OSError) as error:  # an HTTP error of any kind, or no network
        reason = str(error).splitlines()[0]
        raise RunError(
            f"the hub refused {name}: {reason}. The result is in {folder}: hf upload {name} {folder}"
        ) from error
    return str(address)
