"""A finished folder onto the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from steep.errors import RunError, UserError


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


def push(folder: Path, name: str, api: Any = None) -> str:
    """Upload a folder as the model `name`, which is made if need be, private.

    Args:
        api: a `huggingface_hub.HfApi`.

    Returns:
        Its address.

    Raises:
        RunError: the hub refuses; the folder stays.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from steep")
    except (HfHubHTTPError, OSError) as error:  # an HTTP error of any kind, or no network
        reason = str(error).splitlines()[0]
        raise RunError(
            f"the hub refused {name}: {reason}. The result is in {folder}: hf upload {name} {folder}"
        ) from error
    return str(address)
