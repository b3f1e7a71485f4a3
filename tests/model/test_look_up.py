"""A hub that does not answer is told as one: never as a model without weights, and never passed over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from steep.errors import UserError
from steep.model import look_up
from steep.model.adapters import add_adapters
from steep.model.load import load
from steep.model.look_up import find
from steep.model.original_module import OriginalModule, offload_originals
from steep.model.resolve import read_tokenizer, resolve
from steep.model.safety import check_weights_in_safetensors
from steep.model.weight_files import weight_files

COMMIT = "0" * 40
LOST = r"the hub \(http://127\.0\.0\.1:9\) cannot be reached to look for .*HF_HUB_OFFLINE=1 .*local folder"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, which is on, and whose network is lost: nothing listens at that port."""
    monkeypatch.setattr(look_up, "_as_it_is", {})
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries five times more
    return folder


@pytest.fixture
def snapshot(cache: Path, llama_folder: Path) -> Path:
    """A model that was downloaded before, and of which the cache does not know what else the hub has."""
    repository = cache / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return Path(shutil.copytree(llama_folder, repository / "snapshots" / COMMIT))


def test_a_lost_network(cache: Path) -> None:
    for ask in (
        lambda: find("a/b", "config.json"),
        lambda: weight_files("a/b"),
        lambda: resolve("a/b"),
    ):
        with pytest.raises(UserError, match=r"127\.0\.0\.1:9") as raised:
            ask()
        assert "has no weights" not in str(raised.value) and "local folder" in str(raised.value)
    with pytest.raises(UserError, match=LOST):
        weight_files("a/b")


def test_a_cached_model_is_taken_as_it_is(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As `hf download` leaves it, without a mark for what the hub does not have. It is said, and waited for, once."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    with caplog.at_level("WARNING", "steep"):
        model, tokenizer = load("a/b", base="fp32", compute_dtype="fp32")
        assert weight_files("a/b") == [snapshot / "model.safetensors"]
    assert model.config.model_type == "llama" and len(tokenizer) == 384
    said = r"the hub \(http://127\.0\.0\.1:9\) cannot be asked for adapter_config\.json of a/b \(.*\): of this model, "
    (line,) = [record.getMessage() for record in caplog.records if record.name == "steep"]
    assert re.match(said, line)
    assert len(waited) == 5


def test_weights_that_are_not_in_the_cache_are_not_taken_for_missing(snapshot: Path) -> None:
    assert find("a/b", "config.json") == snapshot / "config.json"
    (snapshot / "model.safetensors").unlink()
    for ask in (lambda: weight_files("a/b"), lambda: check_weights_in_safetensors(resolve("a/b"))):
        with pytest.raises(UserError, match=LOST.replace("look for .*", r"look for model\.safetensors of a/b.*")):
            ask()
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=LOST.replace("look for .*", r"look for model-1\.safetensors of a/b.*")):
        weight_files("a/b")
    (snapshot / "config.json").unlink()
    with pytest.raises(UserError, match=LOST):
        find("a/b", "adapter_config.json")


@pytest.mark.parametrize("refusal", [GatedRepoError, HfHubHTTPError])
def test_access_that_was_lost(refusal: type[HfHubHTTPError], snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is in the cache, and was gated or limited since."""

    def refused(*given: Any, **named: Any) -> Any:
        response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
        raise refusal("403 Client Error", response=response)

    monkeypatch.setattr(look_up, "hf_hub_download", refused)
    with pytest.raises(UserError, match=r"the hub does not give adapter_config\.json of a/b: 403 Client Error"):
        find("a/b", "adapter_config.json")
    known = snapshot.parents[1] / ".no_exist" / COMMIT
    known.mkdir(parents=True)
    (known / "adapter_config.json").touch()
    assert find("a/b", "adapter_config.json") is None


def test_what_the_hub_once_said_no_to_is_kept(snapshot: Path) -> None:
    known = snapshot.parents[1] / ".no_exist" / COMMIT
    known.mkdir(parents=True)
    for name in ("adapter_config.json", "model.safetensors.index.json"):
        (known / name).touch()
    resolved = resolve("a/b")
    check_weights_in_safetensors(resolved)
    assert weight_files("a/b") == [snapshot / "model.safetensors"]
    assert len(read_tokenizer(resolved)) == 384


def test_with_the_hub_off_the_cache_is_all_there_is(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weight_files("a/b") == [snapshot / "model.safetensors"]
    check_weights_in_safetensors(resolve("a/b"))


def test_nothing_is_asked_where_nothing_may_be_downloaded(snapshot: Path) -> None:
    assert find("a/b", "README.md", download=False) is None
    (snapshot / "model.safetensors").unlink()
    assert weight_files("a/b", download=False) == []


def test_the_originals_of_a_cached_model_are_read_from_the_cache(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_adapters(load("a/b", base="fp32")[0], r=4)
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    offload_originals(model)
    originals = [module for module in model.modules() if isinstance(module, OriginalModule)]
    assert [module.matrix.file for module in originals] == [snapshot / "model.safetensors"] * len(originals)
    assert originals and not waited
