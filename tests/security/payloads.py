"""Payloads that write a file when they run, one for each way that Python has to run what is in a file."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml


class Payload:
    """Something to plant. `ran` tells whether it did; each test first shows, by `works`, that it would have.

    Args:
        folder: where the mark is written.
    """

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "the payload ran"

    @property
    def ran(self) -> bool:
        return self.mark.exists()

    def works(self) -> bool:
        """Whether it has just run; it is then as if it had not."""
        ran = self.ran
        self.mark.unlink(missing_ok=True)
        return ran

    @property
    def pickled(self) -> bytes:
        """A pickle; whoever unpickles it runs it."""
        data = pickle.dumps(_Opens(self.mark))
        pickle.loads(data)
        assert self.works()
        return data

    def torch_file(self, file: Path) -> Path:
        """The same as `torch.save` writes it."""
        torch.save({"weight": torch.ones(1), "more": _Opens(self.mark)}, file)
        torch.load(file, weights_only=False)
        assert self.works()
        return file

    def module(self, file: Path, *names: str) -> Path:
        """Python code with the classes `names`; importing it runs it."""
        classes = "".join(f"\n\nclass {name}:\n    pass\n" for name in names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"from pathlib import Path\n\nPath({str(self.mark)!r}).touch()\n{classes}", encoding="utf-8")
        spec = importlib.util.spec_from_file_location("planted", file)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert self.works()
        return file

    @property
    def template(self) -> str:
        """A chat template; rendering it outside of a sandbox runs it."""
        text = f"{{{{ cycler.__init__.__globals__.os.open({str(self.mark)!r}, 64) }}}}"  # O_CREAT
        jinja2.Environment().from_string(text).render()
        assert self.works()
        return text

    @property
    def tag(self) -> str:
        """A YAML value; a loader of all tags runs it."""
        text = f"!!python/object/apply:builtins.open [{str(self.mark)!r}, w]"
        yaml.unsafe_load(text).close()
        assert self.works()
        return text


class _Opens:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)
