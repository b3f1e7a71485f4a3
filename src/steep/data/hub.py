"""Data sets of the Hugging Face hub, through `datasets`, which downloads and caches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from steep.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from steep.data.sources import Source

_ROWS = 512  # rows decoded at a time


def load_hub(source: Source, field: str) -> Dataset:
    """The data set with its one text column, downloaded if it is not in the cache of `datasets`.

    Raises:
        UserError: it cannot be reached or does not exist, needs a script of its own, has files that cannot be read, or
            has no such subset, split or text field.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
    try:
        # OfflineModeIsEnabled is a ConnectionError, DatasetNotFoundError a FileNotFoundError.
        data = load_dataset(source.location, source.subset, split=source.split, revision=source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        remedy = (
            "Check the name, log in with `hf auth login` if it is gated, unset HF_HUB_OFFLINE, download it beforehand "
            "where there is a network, or give the files as a local path"
        )
        raise UserError(f"{field}.hub", f"{name} cannot be loaded ({_reason(error)})", remedy) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        remedy = "Use a revision or a copy of it that consists of data files, or give the files as a local path"
        if type(error) is ValueError:  # an unknown subset or split; a file that cannot be parsed raises a subclass
            remedy = "Correct subset or split"
        raise UserError(f"{field}.hub", f"{name} cannot be loaded ({_reason(error)})", remedy) from error
    if source.text_field not in data.column_names:
        there = ", ".join(map(repr, data.column_names))
        problem = f"{name}: no field {source.text_field!r}; the fields there are {there}"
        raise UserError(f"{field}.text_field", problem, "Set text_field to the one that holds the text")
    return data.select_columns([source.text_field])


def read_hub(source: Source, field: str) -> Iterator[str]:
    """Yield every row's text.

    Raises:
        UserError: as `load_hub`, or a row whose field is no string.
    """
    number = 0
    for batch in load_hub(source, field).iter(batch_size=_ROWS):
        for text in batch[source.text_field]:  # pyright: ignore[reportCallIssue, reportArgumentType]
            number += 1
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                problem = f"{source.hub}, row {number}: {source.text_field!r} is {kind} and not a string"
                remedy = "Set text_field to a field of text, or remove such rows"
                raise UserError(f"{field}.text_field", problem, remedy)
            yield text


def _reason(error: Exception) -> str:
    """The first line, and that of what caused it: "An error occurred while generating the dataset" says little."""
    lines = [str(each).strip().split("\n")[0] for each in (error, error.__cause__) if each is not None]
    return ": ".join(line for line in lines if line)
