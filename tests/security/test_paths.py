"""No name and no link leads out of the folder that it stands in."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.errors import UserError
from steep.hand_over import export_run
from steep.model.base_tensors import BaseTensors
from steep.model.load import load
from steep.model.resolve import resolve
from steep.model.safety import refuse_link_outside
from steep.report.page import write_report
from steep.report.watch import LivePage
from steep.result import evaluate_run, generate_run
from steep.run import train_run
from steep.run_folder import RunFolder
from tests.report.runs import write_run
from tests.test_run import lines, run_file


@pytest.fixture
def base(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "models" / "base"))


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE", "..", "a/../../secret.safetensors", 7, None])
def test_an_index_that_climbs(name: Any, base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "models" / "secret.safetensors"
    (base / "model.safetensors").rename(secret)
    tensors = BaseTensors(str(_with_index(base, secret, "model-1.safetensors")))  # by a right name it would be read
    assert "lm_head.weight" in tensors
    _with_index(base, secret, str(secret) if name == "ABSOLUTE" else name)
    with pytest.raises(UserError, match=r"names a shard outside of its folder|index\.json is damaged"):
        resolve(str(base))
    with pytest.raises(UserError, match=r"names a shard outside of its folder|index\.json is damaged"):
        BaseTensors(str(base))


def _with_index(base: Path, weights: Path, name: Any) -> Path:
    shutil.copyfile(weights, base / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return base


def test_weights_under_a_name_of_the_configs_own(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["transformers_weights"] = "../secret.safetensors"
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"names \.\./secret\.safetensors as its weights"):
        resolve(str(base))


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "config.json"])
def test_a_link_in_a_base_does_not_bring_another_file_into_an_export(
    name: str, base: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_run(run_file(base, korean_corpus, run, training={"max_steps": 2}))
    secret = tmp_path / "secret"
    secret.write_text((base / name).read_text(encoding="utf-8") if (base / name).exists() else "secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name} is a link out of its folder"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_let_pass(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        blob = tmp_path / "hub" / "models--a--b" / "blobs" / str(number)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    found = resolve(str(snapshot)).file("config.json")
    assert found is not None and found.is_symlink()
    model, _ = load(str(snapshot), base="fp32", compute_dtype="fp32")
    assert model.config.model_type == "llama"
    text = (snapshot / "config.json").read_text(encoding="utf-8")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(text, encoding="utf-8")  # edited in place
    (tmp_path / "to the snapshot").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "to the snapshot"):
        found = resolve(str(place)).file("generation_config.json")
        assert found is not None and found.is_symlink()
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "secrets")
    blobs.symlink_to(tmp_path / "secrets")
    with pytest.raises(UserError, match=r"generation_config\.json is a link out of its folder"):
        refuse_link_outside(snapshot / "generation_config.json", snapshot, "model.name")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_may_be_made_of_links(sharded: bool, base: Path, tmp_path: Path) -> None:
    """A store of models; but what is no file of the checkpoint does not come along."""
    if sharded:
        tensors = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        save_file(tensors, base / "model-1.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in base.iterdir():
        (linked / file.name).symlink_to(file)
    model, _ = load(str(linked), base="fp32", compute_dtype="fp32")
    assert model.config.model_type == "llama"
    resolved = resolve(str(linked))
    found = resolved.file("generation_config.json")
    assert found is not None and found.is_symlink()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (linked / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"README\.md is a link out of its folder"):
        resolved.file("README.md")


@pytest.fixture(scope="module")
def trained(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, training={"max_steps": 2, "save_steps": 1}))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "ko"))


@pytest.mark.parametrize(
    "command",
    [
        evaluate_run,
        lambda run: generate_run(run, "the river"),
        lambda run: export_run(run, run.parent / "out", to="adapter"),
        lambda run: write_report([run]),
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.yaml", "final/notes.json", ".report.html.writing"])
def test_a_link_in_a_run_folder_is_refused(
    name: str, command: Callable[[Path], Any], run: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((run / name).read_bytes() if (run / name).exists() else b"secret")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    before = secret.read_bytes()
    with pytest.raises(UserError, match=r"is a link, and a run's files are its own\. Remove it"):
        command(run)
    assert secret.read_bytes() == before and not (run.parent / "out").exists()


def test_a_resumed_run_does_not_write_through_a_link(
    run: Path, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    shutil.rmtree(run / "final")
    secret = tmp_path / "secret"
    (run / "samples.jsonl").rename(secret)
    (run / "samples.jsonl").symlink_to(secret)
    before = secret.read_bytes()
    config = run_file(llama_folder, korean_corpus, run, training={"max_steps": 2, "save_steps": 1})
    with pytest.raises(UserError, match=r"samples\.jsonl is a link"):
        train_run(config, resume=True)
    assert secret.read_bytes() == before
    (run / "samples.jsonl").unlink()
    train_run(config, resume=True)


def test_the_live_page_says_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    (tmp_path / "secret").write_text('{"step": 1, "prompt": "secret", "completion": "secret"}\n', encoding="utf-8")
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").symlink_to(tmp_path / "secret")
    data = LivePage([folder]).data()
    assert "samples.jsonl is a link" in data["problem"] and "secret" not in json.dumps(data["parts"])


def test_a_file_is_written_in_its_place_and_not_through_a_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret", encoding="utf-8")
    for name in (".ledger.json.writing", "ledger.json"):
        (tmp_path / name).symlink_to(secret)
    RunFolder(tmp_path).write_json("ledger.json", {"a": 1})
    assert secret.read_text(encoding="utf-8") == "secret" and not (tmp_path / "ledger.json").is_symlink()


def test_an_exported_adapter_holds_nothing_that_was_planted(run: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "training_args.bin", "tokenization_planted.py", "evil.pkl"):
        (run / "final" / name).write_bytes(b"planted")
    save_file({"x": torch.ones(1)}, run / "final" / "more.safetensors")
    export_run(run, tmp_path / "out", to="adapter")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= kept
    assert {Path(name).suffix for name in kept} <= {".json", ".safetensors", ".md", ".jinja"}


@pytest.mark.parametrize(
    "damage", ["climbs", "absolute", "link to a file", "link to a folder", "the checkpoint is a link"]
)
def test_a_checkpoint_that_leads_out_of_its_folder_is_passed_over(
    damage: str,
    run: Path,
    llama_folder: Path,
    korean_corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before is taken, and what lies outside is neither read nor changed."""
    shutil.rmtree(run / "final")
    newest = run / "checkpoint-2"
    shutil.copytree(newest, tmp_path / "outside")
    if damage in ("climbs", "absolute"):
        manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
        name = "../../../outside/optimizer.json" if damage == "climbs" else str(tmp_path / "outside" / "optimizer.json")
        manifest["files"][name] = manifest["files"]["optimizer.json"]
        (newest / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    elif damage == "link to a file":
        (newest / "optimizer.json").unlink()
        (newest / "optimizer.json").symlink_to(tmp_path / "outside" / "optimizer.json")
    elif damage == "link to a folder":
        (newest / "more").symlink_to(tmp_path / "outside")
    else:
        shutil.rmtree(newest)
        newest.symlink_to(tmp_path / "outside")
    before = {path.name: path.read_bytes() for path in (tmp_path / "outside").iterdir()}
    monkeypatch.setattr(logging.getLogger("steep"), "propagate", True)
    with caplog.at_level(logging.INFO, "steep"):
        train_run(run_file(llama_folder, korean_corpus, run, training={"max_steps": 2, "save_steps": 1}), resume=True)
    assert "checkpoint-2 is passed over" in caplog.text and "saving checkpoint-2" in caplog.text
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [1, 2]
    assert {path.name: path.read_bytes() for path in (tmp_path / "outside").iterdir()} == before
    assert (run / "final").is_dir()
