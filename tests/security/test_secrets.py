"""No token and no password lands in a file of a run, an export or a report, nor on the terminal."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from steep.config import load_config, parse_config
from steep.credentials import hide
from steep.data.packing import pack
from steep.errors import UserError
from steep.hand_over import export_run
from steep.report.page import write_report
from steep.result import evaluate_run
from steep.run import train_run
from tests.test_run import run_file
from tests.training.helpers import adapted, trainer_for

SECRETS = {
    "HF_TOKEN": "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "qBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgQ",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIA" + "ABCDEFGHIJ123456",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzPLANTED1",
    "GITHUB_TOKEN": "ghp_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgHiJ",
    "COMPANY_PASSWORD": "correct horse battery staple",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def files_with(text: str, folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_a_run_its_export_and_its_report(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"max_steps": 2, "save_steps": 1, "report_to": "tensorboard"}
    train_run(run_file(llama_folder, korean_corpus, run, training={**settings, "run_name": "a planted name"}))
    evaluate_run(run)
    write_report([run])
    export_run(run, tmp_path / "merged")
    export_run(run, tmp_path / "adapter", to="adapter")
    found = files_with("a planted name", tmp_path)  # so a secret of the arguments would be found, in these too
    assert {"run/run.yaml", "run/report.html", "run/final/training_args.json"} <= set(found)
    assert any("tfevents" in name for name in found)
    assert {name: files_with(value, tmp_path) for name, value in SECRETS.items()} == {name: [] for name in SECRETS}


def test_arguments_of_a_script_are_saved_without_their_token(
    tokenizer: PreTrainedTokenizerFast, korean_corpus: Path, tmp_path: Path
) -> None:
    corpus = pack(korean_corpus, tokenizer, max_length=64, cache_dir=tmp_path / "tokens")
    secret = "hf_" + "anotherOneThatIsGivenAsArgument123"
    trainer = trainer_for(adapted(), corpus, tmp_path / "run", save_strategy="steps", save_steps=1, hub_token=secret)
    trainer.args.max_steps = 1
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "training_args.json").read_text(encoding="utf-8"))["hub_token"]
    assert len(files_with("hub_token", tmp_path)) >= 2 and files_with(secret, tmp_path) == []


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("training", "run_name", SECRETS["HF_TOKEN"]),
        ("training", "project", f"x {SECRETS['WANDB_API_KEY']}"),
        ("training", "output_dir", f"runs/{SECRETS['COMPANY_PASSWORD']}"),
        ("training", "unknown", [{"deep": [SECRETS["AWS_SECRET_ACCESS_KEY"]]}]),
        ("model", "name", "https://ada:hf-password@huggingface.co/ada/model"),
        ("model", "revision", SECRETS["AWS_ACCESS_KEY_ID"]),
        ("evaluation", "prompts", [SECRETS["GITHUB_TOKEN"]]),
        ("data", "sources", [{"hub": f"https://{SECRETS['HF_TOKEN']}@huggingface.co/datasets/a/b"}]),
    ],
)
def test_a_run_file_with_a_secret_is_refused(
    section: str, field: str, value: object, llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    tree = run_file(llama_folder, korean_corpus, tmp_path / "run").model_dump(mode="json")
    parse_config(tree)
    tree[section][field] = value
    with pytest.raises(UserError, match="it holds a token or a password") as caught:
        parse_config(tree)
    assert caught.value.field.startswith(f"{section}.{field}")
    assert "HF_TOKEN" in caught.value.remedy and hide(str(caught.value)) == str(caught.value)


def test_the_hubs_own_argument_is_refused_with_the_remedy(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"training\.hub_token: .*set HF_TOKEN, or log in with hf auth login") as caught:
        run_file(llama_folder, korean_corpus, tmp_path / "run", training={"hub_token": "a short one"})
    assert "a short one" not in str(caught.value)


def test_a_name_that_is_no_secret_is_let_pass(
    llama_folder: Path, korean_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "corpus")
    monkeypatch.setenv("SSH_KEY", str(korean_corpus))
    revision = "0123456789abcdef0123456789abcdef0123456" + "8"
    config = run_file(llama_folder, korean_corpus, tmp_path / "run", model={"revision": revision})
    assert config.model.revision == revision and hide("https://huggingface.co/ada/hf_model@main") == (
        "https://huggingface.co/ada/hf_model@main"
    )


@pytest.mark.parametrize(
    "secret",
    [
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz0123456789",
        "sk-proj-ab_cdefgh-ijklmnopqrstuvwxyz0123456789ABCDEFGHIJ",
        "sk-abcdefghij0123456789T3BlbkFJabcdefghij0123456789",
        "sk-ant-api03-abcDEF0123456789abcDEF0123456789-abc_AA",
        "sk-or-v1-" + "fedcba9876543210" * 4,
        "glpat-abcdefghij0123456789",
        "AKIA" + "ABCDEFGHIJ123457",
        "wandb_v1_" + "abcdefghij0123456789_X",
        "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "89abcdef",
        "wandb login " + "0123456789abcdef" * 2 + "89abcdef",
        "https://:pass@host/x",
        "https://" + "0123456789abcdef" * 2 + "89abcdef@github.com/a/b",
    ],
)
def test_known_forms_are_found_in_any_text(secret: str) -> None:
    said = hide(f"see {secret}, please")
    assert said in ("see ***, please", "see https://***@host/x, please", "see https://***@github.com/a/b, please")


@pytest.mark.parametrize(
    "text",
    [
        "The token is hf_ and my API key is sk-",
        "ssh://git@github.com/a/b",
        "see https://a.b@c",
        "https://ada@example.org:8080/x@y",
        "data/sk-wikipedia20240101articles.jsonl",
        "/data/sk-20231101wikipediaslovakcorpus/x",
        "sk-corpus-2024-filtered-and-deduplicated.jsonl",
        "data/sk-sk/sk-slovakiawikipediaarticles/part-00001.parquet",
        "task-0123456789abcdef0123456789abcdef",
        "glpat-short, github_pat_ and AKIASHORT",
        "commit 0123456789abcdef0123456789abcdef89abcdef",
        "wandb offline 0123456789abcdef0123456789abcdef89abcdef",
    ],
)
def test_plain_words_and_names_are_none(text: str) -> None:
    assert hide(text) == text


def test_aliases_without_end_are_looked_at_once(tmp_path: Path) -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))  # 9 ** 11 texts
    file = tmp_path / "ko.yaml"
    file.write_text(f"a0: &a0 [{SECRETS['HF_TOKEN']}]\n{levels}loop: &loop [*loop]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^a\d+[\[\]\d]*: it holds a token"):
        load_config(file)


def test_nothing_of_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name, value in SECRETS.items():
        said = hide(f"401 for https://huggingface.co/api with {value}, from http://ada:secret@proxy:80")
        assert value not in said and "secret" not in said and "***" in said, name
