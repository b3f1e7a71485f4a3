"""Where the tokens of a streamed data set are kept: one file for each commit, found again without the stream.

A stream is not read to see whether it has changed, so its token file is named after what was asked for (data set,
subset, split, text field, budget, tokenizer) and the commit that answered. Beside it a file `….commit` keeps which
commit the revision (a branch, a tag) named last; where the hub cannot be asked, that is the commit.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steep.data.encoder import digest
from steep.data.hub import data_set_name, find_commit
from steep.data.sources import Source
from steep.errors import UserError


@dataclass(frozen=True)
class Stream:
    """A streamed source at one commit.

    Attributes:
        source: the source, its revision replaced by the commit.
        path: its token file, there or not.
        warning: what the user should know, if the hub could not be asked.
    """

    source: Source
    path: Path
    warning: str | None
    _remembered: Path

    def remember(self) -> None:
        """Keep the commit for a time without a connection; called when the token file is whole."""
        commit = self.source.revision or ""
        if self._remembered.is_file() and self._remembered.read_text() == commit:
            return
        temporary = self._remembered.with_name(f"{self._remembered.name}-{uuid.uuid4().hex}")
        temporary.write_text(commit)
        os.replace(temporary, self._remembered)


def find_stream(source: Source, key: Sequence[bytes], cache_dir: Path, field: str) -> Stream:
    """The commit of a streamed source, and the place of its tokens.

    Args:
        source: a source with `stream`.
        key: what else decides on the tokens: format, text field, tokenizer, budget.
        cache_dir: folder of the token files.
        field: where the source stands in the run file, for messages.

    Raises:
        UserError: the hub has no such data set or revision; or it cannot be asked, and there are no tokens of it.
    """
    given = (source.location, source.subset or "", source.split)
    request = digest([*key, b"stream", *(part.encode() for part in given)]).hex()
    remembered = cache_dir / f"{request}-{digest([(source.revision or 'main').encode()]).hex()}.commit"
    commit, warning = find_commit(source, field), None
    if commit is None:
        commit = remembered.read_text() if remembered.is_file() else None
        path = cache_dir / f"{request}-{commit}.arrow"
        if commit is None or not path.exists():
            problem = (
                f"the hub cannot be reached, and the cache holds no tokens of {data_set_name(source)} read so before"
            )
            remedy = "Connect to it, unset HF_HUB_OFFLINE, or put the cache there that has them (data.cache_dir)"
            raise UserError(f"{field}.hub", problem, remedy)
        warning = f"{field}: the hub cannot be reached; {source.hub} is taken as it was read before, at commit {commit}"
    path = cache_dir / f"{request}-{commit}.arrow"
    return Stream(source.model_copy(update={"revision": commit}), path, warning, remembered)
