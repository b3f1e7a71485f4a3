"""Data sets of the Hugging Face hub, through `datasets`, which downloads and caches them, or streams them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from steep.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from steep.data.sources import Source

_ROWS = 512  # rows decoded at a time
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONNECTION_REMEDY = (
    "Check the name, log in with `hf auth login` if it is gated, unset HF_HUB_OFFLINE, download it beforehand "
    "where there is a network, or give the files as a local path"
)


def load_hub(source: Source, field: str) -> Dataset | IterableDataset:
    """The data set with its one text column: downloaded if it is not in the cache of `datasets`, or as a stream.

    A stream may not know its columns before it is read; then it has all of them.

    Raises:
        UserError: it cannot be reached or does not exist, needs a script of its own, has files that cannot be read, or
            has no such subset, split or text field.
    """
    import yaml
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = data_set_name(source)
    try:
        # OfflineModeIsEnabled is a ConnectionError, DatasetNotFoundError a FileNotFoundError.
        data = load_dataset(
            source.location, source.subset, split=source.split, revision=source.revision, streaming=source.stream
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"{field}.hub", f"{name} cannot be loaded ({_reason(error)})", _CONNECTION_REMEDY) from error
    except (ValueError, RuntimeError, DatasetsError, yaml.YAMLError) as error:  # YAML: the head of its README.md
        remedy = "Use a revision or a copy of it that consists of data files, or give the files as a local path"
        if type(error) is ValueError:  # an unknown subset or split; a file that cannot be parsed raises a subclass
            remedy = "Correct subset or split"
        raise UserError(f"{field}.hub", f"{name} cannot be loaded ({_reason(error)})", remedy) from error
    if source.stream and data.info.builder_name == "cache":
        # Without a connection `datasets` takes what was downloaded earlier, of whatever revision.
        raise UserError(f"{field}.hub", f"{name} cannot be streamed (the hub cannot be reached)", _CONNECTION_REMEDY)
    columns = data.column_names
    if columns is None:
        return data
    if source.text_field not in columns:
        raise _no_field(source, columns, field)
    return data.select_columns([source.text_field])


def read_hub(source: Source, field: str) -> Iterator[str]:
    """Yield every row's text.

    Raises:
        UserError: as `load_hub`, or a row whose field is no string; of a stream also: it breaks, or ends early.
    """
    texts = _streamed(source, field) if source.stream else _stored(source, field)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            problem = f"{source.hub}, row {number}: {source.text_field!r} is {kind} and not a string"
            raise UserError(f"{field}.text_field", problem, "Set text_field to a field of text, or remove such rows")
        yield text


def _stored(source: Source, field: str) -> Iterator[Any]:
    for batch in load_hub(source, field).iter(batch_size=_ROWS):
        yield from batch[source.text_field]  # pyright: ignore[reportCallIssue, reportArgumentType]


def _streamed(source: Source, field: str) -> Iterator[Any]:
    """Row by row, so that no more of the stream is read than is asked for."""
    data = load_hub(source, field)
    number = 0
    for row in _unbroken(data, source, field):
        number += 1
        if source.text_field not in row:
            raise _no_field(source, row, field)
        yield row[source.text_field]
    declared = (data.info.splits or {}).get(source.split)
    if declared is not None and number < declared.num_examples:
        problem = f"the stream of {data_set_name(source)} ended after {number:,} of {declared.num_examples:,} rows"
        remedy = "Start again; if it ends there each time, give another revision, or a max_tokens that ends before"
        raise UserError(f"{field}.hub", problem, remedy)


def _unbroken(data: Iterable[Any], source: Source, field: str) -> Iterator[dict[str, Any]]:
    """The rows; a connection that is lost and not found again is an error and never an end.

    `datasets` has tried to go on by then: each read 20 times, 5 seconds apart.
    """
    import pyarrow as pa
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    lost = (HTTPError, OSError, EOFError)
    damaged = (ValueError, RuntimeError, DatasetsError, pa.ArrowException, zlib.error)
    number = 0
    try:
        for row in data:
            number += 1
            yield row
    except (*lost, *damaged) as error:
        problem = f"the stream of {data_set_name(source)} broke off after {number:,} rows ({_reason(error)})"
        remedy = (
            "Start again, from the beginning of the stream; if it breaks at the same row each time, a file is damaged: "
            "give another revision, or a max_tokens that ends before"
        )
        raise UserError(f"{field}.hub", problem, remedy) from error


def find_commit(source: Source, field: str) -> str | None:
    """The commit that the revision of a hub data set names now; None if the hub cannot be asked.

    A revision that is a whole commit hash is its own answer, without a connection.

    Raises:
        UserError: the hub has no such data set or revision, or keeps it from this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        return HfApi().dataset_info(source.location, revision=source.revision, timeout=100).sha
    except HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            return None
        what = f"{data_set_name(source)} is not to be had at revision {source.revision or 'main'} ({_reason(error)})"
        remedy = "Correct name or revision, or log in with `hf auth login` if it is gated or private"
        raise UserError(f"{field}.hub", what, remedy) from error
    except HFValidationError as error:
        problem = f"{source.hub} is no name of a data set on the hub ({_reason(error)})"
        raise UserError(f"{field}.hub", problem, "Give OWNER/NAME; for files on this machine use path") from error
    except (HTTPError, ConnectionError):  # no network, HF_HUB_OFFLINE
        return None


def data_set_name(source: Source) -> str:
    return f"{source.hub}" + (f" ({source.subset})" if source.subset else "")


def _no_field(source: Source, columns: Iterable[str], field: str) -> UserError:
    there = ", ".join(map(repr, columns))
    problem = f"{data_set_name(source)}: no field {source.text_field!r}; the fields there are {there}"
    return UserError(f"{field}.text_field", problem, "Set text_field to the one that holds the text")


def _reason(error: Exception) -> str:
    """The first line, and that of what caused it: "An error occurred while generating the dataset" says little."""
    lines = [str(each).strip().split("\n")[0] for each in (error, error.__cause__) if each is not None]
    return ": ".join(line for line in lines if line)
