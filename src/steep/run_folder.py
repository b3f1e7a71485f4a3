"""The folder of a run: its files, written so that a reader never sees half of one. Fields: docs/run-folder.md."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from steep.amounts import human_bytes
from steep.data.sources import Source
from steep.errors import UserError
from steep.recorded import SHAPES, read_json, read_lines
from steep.storage import is_temporary, make_folder, naming, remove, remove_leftovers, sync, write_file

_PACKAGES = (
    "steep",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)

# The trainer itself takes lines out of incidents.jsonl: those of steps that are passed over stay.
_REWOUND = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")


class RunFolder:
    """Paths and files of one run.

    Args:
        path: `training.output_dir`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.final = self.path / "final"
        self.tokenizer = self.path / "tokenizer"
        self._locked: os.stat_result | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self, field: str = "training.output_dir") -> Iterator[None]:
        """Hold the folder against other processes. The lock ends with its owner, however that ends; forked processes
        do not share it.

        Raises:
            UserError: another process holds it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        is_open = True

        def close() -> None:
            nonlocal is_open
            if is_open:
                os.close(descriptor)
            is_open = False

        os.register_at_fork(after_in_child=close)  # for good, and without effect once it is closed
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    field, f"another process trains in {self.path}", "Wait for it, or give another folder."
                ) from error
            self._locked = os.fstat(descriptor)
            yield
        finally:
            self._locked = None
            close()

    def check_standing(self, field: str = "training.output_dir") -> None:
        """Check that the folder is still the one that was locked: a save would make it anew, and lose what was in it.

        Raises:
            UserError: it was moved or deleted.
        """
        if self._locked is None or (self.path.exists() and os.path.samestat(self.path.stat(), self._locked)):
            return
        problem = f"{self.path} was moved or deleted while the run went on"
        raise UserError(field, problem, "Put it back, and go on with --resume; or start the run again.")

    def refuse_links(self, field: str = "run folder") -> None:
        """Check that what stands in the folder is the run's own: it may come from somebody else, and through a link
        another file would be shown in a report, copied into an export, or written to. Each checkpoint is looked at when
        it is to be read.

        Raises:
            UserError: there is a link, in the folder, in `final` or in `tokenizer`.
        """
        for path in chain(self.path.glob("*"), self.final.rglob("*"), self.tokenizer.rglob("*")):
            if path.is_symlink() and not path.name.startswith("checkpoint-"):
                raise UserError(field, f"{path} is a link, and a run's files are its own", "Remove it.")

    def clear(self, *, resumed: bool) -> None:
        """Delete what a killed process left half written. For the holder of the lock, before it writes anything.

        Args:
            resumed: the run goes on. Else what a run that never began has left goes too, see `refuse_contents`.
        """
        remove_leftovers(self.path)
        if not resumed:
            for path in self._begun():
                remove(path)

    def refuse_contents(self, field: str = "training.output_dir", *, branch: bool = False) -> None:
        """Check that nothing is lost when a new run takes the folder.

        A process that was killed before it wrote `run.yaml` may have left temporary names, the tokenizer with its new
        tokens, and where its branch came from. These are no run, and do not stand in the way.

        Args:
            branch: the run is a branch of another.

        Raises:
            UserError: there is something in it already, or it cannot be a folder of ours.
        """
        self.check_place(field)
        if self.path.exists() and any(
            not is_temporary(path) and path not in self._begun() for path in self.path.iterdir()
        ):
            what = "holds another run" if (self / "run.yaml").exists() else "is not empty"
            if branch:
                beside = shlex.quote(f"{self.path}-branch")
                remedy = f"A branch has a folder of its own: --training.output_dir {beside}."
            elif (self / "run.yaml").exists():
                remedy = "Give another folder, or go on with that run: --resume."
            else:
                remedy = "Give another folder, or empty it."
            raise UserError(field, f"{self.path} {what}", remedy)

    def _begun(self) -> list[Path]:
        """What a process has left that was killed before it wrote `run.yaml`; temporary names apart."""
        if (self / "run.yaml").exists():
            return []
        tokenizer = [self.tokenizer] if (self.tokenizer / "new_tokens.json").is_file() else []
        return [*tokenizer, *([self / "parent.json"] if (self / "parent.json").is_file() else [])]

    def check_place(self, field: str = "training.output_dir") -> None:
        """Check that the folder can be made, or written into.

        Raises:
            UserError: a file stands there, the folder cannot be written into, or it lies in a part of a run, which may
                delete that.
        """
        place = self.path.absolute().resolve()
        for part in (place, *place.parents):
            own = part.name in ("final", "tokenizer") or re.fullmatch(r"checkpoint-\d+", part.name)
            if own and (part.parent / "run.yaml").is_file():
                raise UserError(field, f"{self.path} lies in {part}, which belongs to that run", "Give another folder.")
        place = self._standing_place()
        if not place.is_dir():
            raise UserError(field, f"{place} is a file", "Give a folder.")
        try:  # permissions alone say nothing of a read-only file system, nor to root
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            # "No such file" of a folder that is there: /proc and its like take no new ones.
            why = "no file can be made there" if isinstance(error, FileNotFoundError) else error.strerror
            problem = f"{place} cannot be written into: {why}"
            raise UserError(field, problem, "Give a folder you may write.") from error

    def refuse_data(self, sources: Sequence[Source], field: str = "training.output_dir") -> None:
        """Check that the run's own files are not read as its text: .jsonl and .md are.

        Raises:
            UserError: the folder is, or lies in, one that a source reads.
        """
        place = self.path.absolute().resolve()
        for source in sources:
            folder = Path(source.path).absolute().resolve() if source.path else None
            if folder is not None and folder.is_dir() and (folder == place or folder in place.parents):
                problem = f"{self.path} lies in {source.path}, where text is read: the run's files would become text"
                raise UserError(field, problem, "Give a folder outside of it.")

    def kept_bytes(self) -> int:
        """What the run's checkpoints and its result take now; they make room for later ones."""
        parts = [*self.path.glob("checkpoint-*"), self.final]
        return sum(file.stat().st_size for part in parts for file in part.rglob("*") if file.is_file())

    def free_bytes(self) -> int:
        """Room on the disk that the folder is, or will be, on."""
        return shutil.disk_usage(self._standing_place()).free

    def check_room(self, needed: int) -> None:
        """That the disk has `needed` bytes for what a run writes, where that of now makes room.

        Raises:
            UserError: it has not.
        """
        if self.free_bytes() + self.kept_bytes() < needed:
            raise UserError(
                "training.output_dir",
                f"the disk of {self.path} has {human_bytes(self.free_bytes())} free, and the run needs about "
                f"{human_bytes(needed)} for its checkpoints and its result",
                "Give another folder, or lower training.save_total_limit or adapter.r.",
            )

    def _standing_place(self) -> Path:
        """The folder, or the nearest one above it that exists."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return place

    def make(self, field: str = "training.output_dir") -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be made.
        """
        try:
            make_folder(self.path)
        except OSError as error:
            raise UserError(
                field, f"{self.path} cannot be made: {error.strerror}", "Give a folder you may write."
            ) from error

    def write_text(self, name: str, text: str) -> None:
        """Replace a file by one rename."""
        write_file(self / name, text)

    def write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        """Replace a JSON file by one rename; NaN is refused, since JSON has none."""
        self.write_text(name, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a JSON-lines file; `sync_lines` brings them to the disk."""
        with naming(self / name), (self / name).open("a", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run, as `steep.recorded` has it; empty if it does not exist.

        Raises:
            UserError: it is damaged.
        """
        return read_json(self / name)

    def sync_lines(self) -> None:
        """Wait until all lines so far are on the disk."""
        for file in self.path.glob("*.jsonl"):
            sync(file)
        sync(self.path)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file, each of a step; none if it does not exist. A last line cut off by a crash is
        left out.

        Raises:
            UserError: it is damaged.
        """
        return read_lines(self / name)

    def refuse_damage(self) -> None:
        """Read what a resumed run goes on with, before it loads or writes anything.

        Raises:
            UserError: a file is damaged.
        """
        for name in SHAPES:
            self.read_lines(name) if name.endswith(".jsonl") else self.read_json(name)

    def drop_result(self) -> bool:
        """Remove `final`, if it is there: a run that goes on is not finished. Whether it was."""
        if not self.final.is_dir():
            return False
        remove(self.final)
        return True

    def rewind(self, step: int, names: Iterable[str] = _REWOUND) -> None:
        """Drop the lines that were written after `step`: the steps behind them are about to be trained again."""
        for name in names:
            kept = [row for row in self.read_lines(name) if row["step"] <= step]
            if (self / name).exists():  # also without a row: what was cut off would be glued to the next one
                self.write_text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


class FolderOfAnother(RunFolder):
    """A run's folder in a process that leaves the lock and all files to another process of the same run: what would
    change something, or look whether it may be changed, does nothing."""

    @contextmanager
    def locked(self, field: str = "") -> Iterator[None]:
        yield

    def clear(self, *, resumed: bool) -> None:
        pass

    def refuse_contents(self, field: str = "", *, branch: bool = False) -> None:
        pass

    def make(self, field: str = "") -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def sync_lines(self) -> None:
        pass

    def drop_result(self) -> bool:
        return False

    def rewind(self, step: int, names: Iterable[str] = ()) -> None:
        pass


def environment() -> dict[str, Any]:
    """`environment.json`: what the run ran on. Versions and hardware, no variables of the environment."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in _PACKAGES},
    }
