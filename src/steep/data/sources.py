"""Where the text comes from: one `Source` is one entry under `data.sources` of a run file.

This file is on the path of `steep --help`, so nothing here imports more than pydantic; the readers load on first use.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

MIN_LENGTH = 8  # tokens of a row, at the least; the run file's schema and `pack` both refuse less
TEXT_FORMATS = ("txt", "md", "jsonl", "csv")
SUPPORTED_SUFFIXES = (*(f".{name}{packed}" for name in TEXT_FORMATS for packed in ("", ".gz", ".zst")), ".parquet")
_SUFFIX = re.compile(rf"\.(?:(?P<text>{'|'.join(TEXT_FORMATS)})(?:\.(?P<packed>gz|zst))?|(?P<parquet>parquet))$", re.I)
_SPLIT_NAME = re.compile(r"\.(?:train|training|valid|validation|dev|test|eval|heldout|replay)$", re.I)
_LONGEST_NAME = 255  # bytes, on every common file system


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


def _place(value: str) -> str:
    if "\0" in value:
        raise ValueError("a place on disk cannot hold the character NUL")
    if any(len(part.encode()) > _LONGEST_NAME for part in value.split("/")):
        raise ValueError(f"a name in it is longer than the {_LONGEST_NAME} bytes that a file's may have")
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError as error:
            raise ValueError(f"there is no home folder {value.split('/')[0]}") from error
    return value


# YAML reads 3e-5 as text, which pydantic turns into a number; it would turn true into 1 as well.
Number = Annotated[float, BeforeValidator(_no_flag), AllowInfNan(False)]
Place = Annotated[str, AfterValidator(_place)]


class Source(BaseModel):
    """A corpus: local files or one Hugging Face data set, and what it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Place | None = Field(
        default=None,
        description="File, folder (with its subfolders) or glob of .txt, .md, .jsonl, .csv (each also .gz or .zst) "
        "or .parquet. Give either path or hub.",
    )
    hub: str | None = Field(default=None, description="Name of a Hugging Face data set, e.g. wikimedia/wikipedia.")
    subset: str | None = Field(default=None, description="Configuration of the hub data set, e.g. 20231101.ko.")
    split: str = Field(default="train", description="Split of the hub data set.")
    revision: str | None = Field(default=None, description="Commit, tag or branch of the hub data set.")
    stream: bool = Field(
        default=False,
        description="Read the hub data set over the network, once, up to max_tokens, instead of downloading all of it.",
    )
    max_tokens: Annotated[int, Strict()] | None = Field(
        default=None,
        gt=0,
        description="Read whole documents from the beginning until the next one would pass so many tokens; "
        "required with stream. Default: all.",
    )
    text_field: str = Field(default="text", description="Field (JSON key, column) that holds a document's text.")
    role: Literal["train", "replay", "heldout"] = Field(
        default="train",
        description="train: what the model shall learn. replay: text like that of its first pretraining, mixed in so "
        "that it forgets less. heldout: never trained, only measured.",
    )
    domain: str | None = Field(
        default=None, description="Name under which results are reported; by default made from the path or hub name."
    )
    weight: Number | None = Field(
        default=None,
        gt=0,
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
        # By its value: the run.yaml of a run names every field.
        if self.path and self.split != "train":
            raise ValueError(f"split: {self.split} belongs to a hub data set, and this source has a path; see role")
        if self.stream and not self.hub:
            raise ValueError("stream belongs to a hub data set, and this source has a path, which is not downloaded")
        if self.stream and self.max_tokens is None:
            raise ValueError("stream needs max_tokens: how much of the data set to read, e.g. 200_000_000")
        return self

    @model_validator(mode="after")
    def _mixed_as_it_says(self) -> Source:
        if self.role == "heldout" and (self.weight is not None or self.repeat):
            raise ValueError("weight and repeat are of text that is trained, and this source is held out")
        if self.role == "train" and self.repeat and self.weight is None:
            raise ValueError("repeat needs weights: without them every document of a train source counts once an epoch")
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
