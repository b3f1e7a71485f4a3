"""Where the text comes from: one `Source` is one entry under `data.sources` of a run file.

This file is on the path of `steep --help`, so nothing here imports more than pydantic; the readers load on first use.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steep.errors import UserError

TEXT_FORMATS = ("txt", "md", "jsonl", "csv")
SUPPORTED_SUFFIXES = (*(f".{name}{packed}" for name in TEXT_FORMATS for packed in ("", ".gz", ".zst")), ".parquet")
_SUFFIX = re.compile(rf"\.(?:(?P<text>{'|'.join(TEXT_FORMATS)})(?:\.(?P<packed>gz|zst))?|(?P<parquet>parquet))$", re.I)
_SPLIT_NAME = re.compile(r"\.(?:train|training|valid|validation|dev|test|eval|heldout|replay)$", re.I)
_WILDCARD = re.compile(r"[*?\[]")


class Source(BaseModel):
    """A corpus: local files or one Hugging Face data set, and what it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        default=None,
        description="File, folder (with its subfolders) or glob of .txt, .md, .jsonl, .csv (each also .gz or .zst) "
        "or .parquet. Give either path or hub.",
    )
    hub: str | None = Field(default=None, description="Name of a Hugging Face data set, e.g. wikimedia/wikipedia.")
    subset: str | None = Field(default=None, description="Configuration of the hub data set, e.g. 20231101.ko.")
    split: str = Field(default="train", description="Split of the hub data set.")
    revision: str | None = Field(default=None, description="Commit, tag or branch of the hub data set.")
    text_field: str = Field(default="text", description="Field (JSON key, column) that holds a document's text.")
    role: Literal["train", "replay", "heldout"] = Field(
        default="train",
        description="train: what the model shall learn. replay: text like that of its first pretraining, mixed in so "
        "that it forgets less. heldout: never trained, only measured.",
    )
    domain: str | None = Field(
        default=None, description="Name under which results are reported; by default made from the path or hub name."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Share of the tokens relative to the other sources of the same role. Without weights every "
        "document counts once an epoch.",
    )
    repeat: bool = Field(
        default=False,
        description="Whether a source that runs out before its weight (or the replay share) is reached starts again.",
    )

    @model_validator(mode="after")
    def _exactly_one_place(self) -> Source:
        if bool(self.path) == bool(self.hub):
            found = "both" if self.path else "neither"
            raise ValueError(f"a source needs exactly one of path and hub, and has {found}")
        if self.path and (self.subset or self.revision):
            raise ValueError("subset and revision belong to a hub data set, and this source has a path")
        return self

    @property
    def location(self) -> str:
        """The path or the hub name, as written."""
        return self.path or self.hub or ""

    @property
    def domain_name(self) -> str:
        """`domain`, or its default: "data/ko-law.train.jsonl.gz" → "ko-law", hub "wikimedia/wikipedia" with subset
        "20231101.ko" → "wikipedia-20231101.ko"."""
        if self.domain:
            return self.domain
        if self.hub:
            name = self.hub.rstrip("/").split("/")[-1]
            return f"{name}-{self.subset}" if self.subset else name
        # "." and "corpora/" have no useful last component until they are resolved; globs are not resolved.
        parts = [part for part in Path(self.location).expanduser().absolute().parts if part not in ("/", ".", "..")]
        for part in reversed(parts):
            name = _SPLIT_NAME.sub("", _SUFFIX.sub("", part))
            name = re.sub(r"\[[^\]]*\]|[*?]", "", name).strip("-_. ")
            if name:
                return name
        return "corpus"


def file_format(path: Path) -> tuple[str, str | None] | None:
    """("jsonl", "gz") for x.jsonl.gz, ("parquet", None) for x.parquet, None for a suffix that steep does not read."""
    match = _SUFFIX.search(path.name)
    if match is None:
        return None
    packed = match["packed"]
    return (match["text"] or match["parquet"]).lower(), packed.lower() if packed else None


def list_files(source: Source, field: str) -> list[Path]:
    """The files of a source with a path, sorted by name; folders with their subfolders, without hidden files.

    Args:
        source: a source with `path`.
        field: where the source stands in the run file, e.g. "data.sources[0]"; error messages start with it.

    Raises:
        UserError: the path does not exist, or no file of a supported format is there.
    """
    path = Path(source.location).expanduser()
    supported = f"Supported suffixes: {' '.join(SUPPORTED_SUFFIXES)}"
    if path.is_file():
        found, files = 1, [path]
    elif path.is_dir():
        everything = [item for item in path.rglob("*") if item.is_file()]
        visible = [p for p in everything if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        found, files = len(visible), visible
    elif _WILDCARD.search(source.location):
        matches = [Path(name) for name in glob.glob(str(path), recursive=True)]
        found, files = len(matches), [match for match in matches if match.is_file()]
        if not matches:
            raise UserError(f"{field}.path", f"no file matches {source.location}", "Check the pattern")
    else:
        raise UserError(
            f"{field}.path",
            f"{path} does not exist",
            f"Check the spelling; relative paths start at the working folder, here {Path.cwd()}",
        )
    files = sorted((file for file in files if file_format(file)), key=lambda file: file.as_posix())
    if not files:
        problem = f"{source.location} holds no file that steep reads ({found} other files there)"
        raise UserError(f"{field}.path", problem, supported)
    return files


def read_documents(source: Source, field: str) -> Iterator[str]:
    """Yield the text of every document, in order, without holding more than a document (a batch of rows) in memory.

    A .txt or .md file is one document; a .jsonl line, a .csv row or a .parquet row is one.

    Args:
        source: what to read.
        field: where the source stands in the run file, e.g. "data.sources[0]".

    Raises:
        UserError: something cannot be read as text; the message names the file and the place in it.
    """
    if source.hub:
        from steep.data.hub import read_hub

        yield from read_hub(source, field)
        return
    from steep.data.readers import read_file

    for file in list_files(source, field):
        kind, packed = file_format(file) or ("", None)
        yield from read_file(file, kind, packed, source.text_field, field)
