"""A run with new tokens: planned, trained, resumed, scored, and its result opened by plain PEFT."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from steep import run
from steep.config import parse_config
from steep.errors import UserError
from steep.evaluation.perplexity import evaluate
from steep.hand_over import export_run
from steep.model.adapters import open_adapter
from steep.model.embeddings import untie
from steep.model.load import keep_4bit_layout, load
from steep.model.new_rows import NEW_ROWS, NewRows, read_new_rows
from steep.model.new_tokens import grow_embeddings
from steep.model.original_module import OriginalModule
from steep.plan import plan_run
from steep.result import evaluate_run, generate_run, load_result
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.terminal import plan_tables
from steep.training.trainer import Trainer
from steep.vocabulary import warnings
from tests import test_run
from tests.test_run import lines
from tests.tiny import documents, save_tiny, sentencepiece_tokenizer, tiny_tokenizer
from tests.training.helpers import contents

NEW = 40


def write(folder: Path, texts: dict[str, list[str]]) -> Path:
    folder.mkdir()
    for name, some in texts.items():
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    korean, english = documents("ko", 120), documents("en", 60)
    # Two of ten documents of the old language hold a Korean word.
    mixed = [f"{text} 도서관이" if number % 5 == 0 else text for number, text in enumerate(english[40:50])]
    return write(
        tmp_path_factory.mktemp("texts") / "corpus",
        {"ko": korean[:100], "en": english[:40], "old": mixed, "ko-test": korean[100:]},
    )


def run_file(model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> RunConfig:
    own: dict[str, dict[str, Any]] = {
        "model": {"new_tokens": {"auto": NEW}},
        "data": {
            "sources": [
                {"path": str(corpus / "ko.jsonl")},
                {"path": str(corpus / "en.jsonl"), "role": "replay"},
                {"path": str(corpus / "old.jsonl"), "role": "heldout"},
                {"path": str(corpus / "ko-test.jsonl"), "role": "heldout", "domain": "ko"},
            ],
            "holdout": 0.0,
            "replay_share": 0.2,
        },
    }
    given = {name: {**own.get(name, {}), **sections.get(name, {})} for name in own | sections}
    return test_run.run_file(model, corpus, folder, **given)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


KINDS = {
    "byte-level, tied": {"tied": True},
    "byte-level, untied here": {"tied": True, "untie": True},
    "metaspace, untied": {"tied": False, "tokenizer": sentencepiece_tokenizer},
    "byte-level, untied, rows to spare": {"tied": False, "vocab_size": 512},
    "metaspace, tied, few rows to spare": {"tied": True, "tokenizer": sentencepiece_tokenizer, "vocab_size": 400},
}


class Finished:
    """A run over a 4-bit base, with the model as it ended."""

    def __init__(self, kind: str, corpus: Path, folder: Path) -> None:
        settings = dict(KINDS[kind])
        untie = settings.pop("untie", False)
        self.base_is_tied: bool = settings["tied"]
        self.tied, self.rows_before = self.base_is_tied and not untie, settings.get("vocab_size", 384)
        self.rows = max(384 + NEW, self.rows_before)
        self.original = settings.pop("tokenizer", tiny_tokenizer)()
        self.base = save_tiny("llama", folder / "base", tokenizer=self.original, **settings)
        self.folder = folder / "run"
        self.config = run_file(self.base, corpus, self.folder, model={"base": "nf4", "untie_embeddings": untie})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "Trainer", lambda **given: self._note(given["model"]) or Trainer(**given))
            train_run(self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "final")

    def _note(self, model: Any) -> None:
        """Keep the model, and a copy of the trained embeddings as they begin."""
        self.model: Any = model
        self.begun = {name: parameter.detach().clone() for name, parameter in embeddings(model).items()}


def embeddings(model: Any) -> dict[str, torch.Tensor]:
    """The trained embeddings by name; a tied head is the table."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        last: parameter
        for last in ("embed_tokens", "lm_head")
        for name, parameter in trained.items()
        if f".{last}.modules_to_save." in name
    }


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(request.param, corpus, tmp_path_factory.mktemp("run"))


def blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


# PEFT says it of an adapter with a head of its own for a tied base.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_final_opens_by_the_lines_in_its_readme(finished: Finished) -> None:
    final = finished.folder / "final"
    readme = (final / "README.md").read_text(encoding="utf-8")
    with_tokenizer, in_one_go, by_hand = blocks(readme)
    assert ("resize_token_embeddings" in by_hand) is (finished.rows > finished.rows_before)
    names: dict[str, Any] = {}
    exec(with_tokenizer, names)
    tokenizer = names["tokenizer"]
    assert len(tokenizer) == 384 + NEW
    text = "강물이 북쪽 다리를 건넌다. the river"
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    assert int(tokens.max()) >= 384
    with torch.no_grad():
        expected = finished.model.eval()(tokens.to(finished.model.device)).logits.cpu()
    assert expected.shape[-1] == finished.rows
    for lines_of_code in (in_one_go, by_hand):
        names = {}
        exec(lines_of_code, names)
        opened = names["model"].eval()
        keep_4bit_layout(opened)  # on some CPUs bitsandbytes would compute in bf16, whatever it was told
        with torch.no_grad():
            got = opened(tokens.to(opened.device)).logits.cpu()
        # The lines compute as the run does: on a GPU in bf16.
        close = {"rtol": 1e-6, "atol": 1e-6} if opened.device.type == "cpu" else {"rtol": 0.05, "atol": 0.3}
        torch.testing.assert_close(got.float(), expected.float(), rtol=close["rtol"], atol=close["atol"])
        base: Any = opened.get_base_model()
        assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) is finished.tied


def test_each_matrix_stands_once(finished: Finished) -> None:
    """Twice where it is tied, under both names, as PEFT reads it; never the base's own as well."""
    for folder in ("final", "checkpoint-3", "checkpoint-6"):
        with safe_open(finished.folder / folder / "adapter_model.safetensors", framework="pt") as file:
            large = {name: file.get_tensor(name) for name in file.keys() if "lora_" not in name}  # noqa: SIM118
        assert sorted(large) == [f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")]
        assert all(tensor.shape == (finished.rows, 64) for tensor in large.values())
        assert torch.equal(*large.values()) is finished.tied
        assert read(finished.folder / folder / "tokenizer.json") == read(finished.folder / "tokenizer/tokenizer.json")


def test_resumed_to_the_bit(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    for name in ("final", "checkpoint-6"):
        shutil.rmtree(folder / name)
    # The run's own tokenizer counts, whatever would be learned now, and the rows that its tokens began with.
    monkeypatch.setattr("steep.vocabulary.learn", lambda *given: pytest.fail("learned anew"))
    monkeypatch.setattr("steep.model.new_tokens._fill", lambda *given: pytest.fail("made again"))
    config = finished.config.model_copy(deep=True)
    config.training.output_dir = str(folder)
    train_run(config, resume=True)
    one, two = (root / "final" / "adapter_model.safetensors" for root in (finished.folder, folder))
    assert one.read_bytes() == two.read_bytes()
    fields = ("step", "loss", "grad_norm", "tokens")
    expected, got = lines(finished.folder / "metrics.jsonl"), lines(folder / "metrics.jsonl")
    assert [[row[field] for field in fields] for row in got] == [[row[field] for field in fields] for row in expected]
    assert lines(folder / "evaluation.jsonl") == lines(finished.folder / "evaluation.jsonl")
    assert (folder / "tokenizer" / "new_tokens.json").read_bytes() == (
        finished.folder / "tokenizer" / "new_tokens.json"
    ).read_bytes()


def test_resumed_before_its_first_checkpoint(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    for name in ("final", "checkpoint-3", "checkpoint-6"):
        shutil.rmtree(folder / name)
    monkeypatch.setattr("steep.model.new_tokens._fill", lambda *given: pytest.fail("made again"))
    config = finished.config.model_copy(deep=True)
    config.training.output_dir = str(folder)
    train_run(config, resume=True)
    for name in (f"checkpoint-6/{NEW_ROWS}", "final/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_the_first_rows_are_in_a_file_of_their_own(finished: Finished) -> None:
    files = [finished.folder / name / NEW_ROWS for name in ("tokenizer", "checkpoint-3", "checkpoint-6")]
    assert len({file.read_bytes() for file in files}) == 1
    assert sorted(finished.folder.rglob(NEW_ROWS)) == sorted(files)
    rows = read_new_rows(files[0])
    assert rows.ids.tolist() == list(range(384, 384 + NEW))
    assert rows.tables.keys() == ({"embed_tokens"} if finished.base_is_tied else {"embed_tokens", "lm_head"})
    assert finished.begun.keys() == ({"embed_tokens"} if finished.tied else {"embed_tokens", "lm_head"})
    for name, began in finished.begun.items():
        stored = rows.tables.get(name, rows.tables["embed_tokens"])
        assert torch.equal(began[rows.ids].to(stored.dtype), stored)
        assert not torch.equal(embeddings(finished.model)[name][rows.ids], began[rows.ids])
    assert files[0].stat().st_size < len(rows.ids) * (8 + 64 * 4 * len(rows.tables)) + 700


def test_a_result_reads_the_first_rows_and_makes_none(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(finished.folder, tmp_path / "run"))
    rows = read_new_rows(folder.tokenizer / NEW_ROWS)
    others = {name: table + 1 for name, table in rows.tables.items()}
    (folder.tokenizer / NEW_ROWS).write_bytes(NewRows(rows.ids, others).to_bytes())
    plan = plan_run(finished.config, grown_tokenizer=folder.tokenizer, to_train=False)
    model = load_result(finished.config, plan.resolved, plan.tokenizer, folder)
    originals = {
        name.split(".")[-2]: module for name, module in model.named_modules() if isinstance(module, OriginalModule)
    }
    assert originals.keys() == {"embed_tokens", "lm_head"}
    with model.disable_adapter():
        for name, module in originals.items():
            expected = others.get(name, others["embed_tokens"])
            assert torch.equal(module.weight[rows.ids.to(module.device)].cpu(), expected)


def test_a_checkpoint_opens_alone(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied to another place, without the run."""
    checkpoint = shutil.copytree(finished.folder / "checkpoint-6", tmp_path / "elsewhere")
    monkeypatch.setattr("steep.model.new_tokens._fill", lambda *given: pytest.fail("made again"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = torch.tensor([tokenizer("강물이 북쪽 다리를 건넌다. the river")["input_ids"]])
    assert int(tokens.max()) >= 384
    base, original = load(str(finished.base), base="nf4")
    grow_embeddings(base, original, tokenizer, checkpoint / NEW_ROWS)
    if finished.tied is not finished.base_is_tied:
        untie(base)
    device = finished.model.device
    with torch.no_grad():
        before = base.eval()(tokens.to(base.device)).logits
        model = open_adapter(base, checkpoint, offloads=True).eval()
        assert torch.equal(model(tokens.to(base.device)).logits, finished.model.eval()(tokens.to(device)).logits)
        with model.disable_adapter():
            assert torch.equal(model(tokens.to(base.device)).logits, before)


@pytest.mark.parametrize("harm", ["a changed byte", "gone", "of another run"])
@pytest.mark.parametrize("finished", ["byte-level, tied", "metaspace, untied"], indirect=True)
def test_harm_to_the_first_rows_is_told(harm: str, finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    file = folder / "tokenizer" / NEW_ROWS
    config = finished.config.model_copy(deep=True)
    config.training.output_dir = str(folder)
    content = bytearray(file.read_bytes())
    if harm == "a changed byte":
        content[-5] ^= 1
        file.write_bytes(content)
        said = f"{file} is damaged: it does not hold what was written"
    elif harm == "gone":
        file.unlink()
        said = f"{file}, the rows that new tokens begin with, is not there"
    else:
        rows = read_new_rows(file)
        file.write_bytes(NewRows(rows.ids, {name: table + 1 for name, table in rows.tables.items()}).to_bytes())
        said = f"{file} is not the {NEW_ROWS} of {folder / 'checkpoint-6'}"
    before = contents(folder)
    with pytest.raises(UserError, match=f"^run folder: {re.escape(said)}. Put (it )?back"):
        train_run(config, resume=True)
    assert contents(folder) == before
    if harm != "of another run":
        for use in (
            lambda: evaluate_run(folder),
            lambda: generate_run(folder, "강물이", max_new_tokens=2),
            lambda: export_run(folder, tmp_path / "out"),
        ):
            with pytest.raises(UserError, match=f"^run folder: {re.escape(said)}. Put it back"):
                use()
    shutil.copyfile(folder / "checkpoint-3" / NEW_ROWS, file)  # as the error says
    train_run(config, resume=True)
    if harm == "gone":
        right = file.read_bytes()
        for path in [*folder.glob("checkpoint-*"), folder / "final"]:
            shutil.rmtree(path)
        file.unlink()
        train_run(config, resume=True)
        assert file.read_bytes() == right, "nothing was trained from them: they are made again"


def test_evaluated_and_generated_again(finished: Finished) -> None:
    base, trained = evaluate_run(finished.folder)
    rows = lines(finished.folder / "evaluation.jsonl")
    for step, scores in ((0, base), (6, trained)):
        assert [(score.domain, score.loss) for score in scores] == [
            (row["domain"], pytest.approx(row["loss"], rel=1e-6)) for row in rows if row["step"] == step
        ]
    assert [(score.documents, score.bytes) for score in base] == [(score.documents, score.bytes) for score in trained]
    by_domain = {score.domain: score.tokens for score in base}, {score.domain: score.tokens for score in trained}
    assert by_domain[0]["ko"] > 1.15 * by_domain[1]["ko"]
    samples = {(row["step"], row["prompt"]): row["completion"] for row in lines(finished.folder / "samples.jsonl")}
    assert all(score.loss < before.loss for before, score in zip(base, trained, strict=True) if score.domain == "ko")
    assert generate_run(finished.folder, "강물이", max_new_tokens=4) == {
        "base": samples[0, "강물이"],
        "trained": samples[6, "강물이"],
    }


def test_the_base_is_scored_with_its_own_tokenizer(finished: Finished) -> None:
    from steep.data.packing import pack
    from steep.model.load import load

    config = finished.config
    model, tokenizer = load(str(finished.base), base="nf4")
    assert len(tokenizer) == 384
    own = pack(config.data.sources, tokenizer, max_length=64, holdout=0.0).heldout
    expected = evaluate(model, own, max_length=64, batch_tokens=64 * config.training.per_device_train_batch_size)
    rows = [row for row in lines(finished.folder / "evaluation.jsonl") if row["step"] == 0]
    measured = [row["bits_per_byte"] for row in rows]
    if finished.rows_before == 384:
        assert measured == [score.bits_per_byte for score in expected]
    else:  # the stock model's own rows to spare take a share; they are not predicted where new tokens stand in them
        assert all(
            0.8 * score.bits_per_byte < got < score.bits_per_byte for got, score in zip(measured, expected, strict=True)
        )


def test_what_the_plan_says(finished: Finished, corpus: Path) -> None:
    plan = read(finished.folder / "plan.json")
    figures = plan["new_tokens"]
    assert (figures["asked"], figures["added"]) == (NEW, NEW)
    sources = {(source["domain"], source["role"]): source for source in figures["sources"]}
    assert list(sources) == [("ko", "train"), ("en", "replay"), ("old", "heldout"), ("ko", "heldout")]
    assert [source["old_language"] for source in sources.values()] == [False, True, True, False]
    assert sources["en", "replay"]["share_that_differs"] == 0
    assert sources["old", "heldout"]["share_that_differs"] == pytest.approx(0.2)
    assert sources["ko", "train"]["share_that_differs"] >= 0.99
    texts = [json.loads(line)["text"] for line in (corpus / "ko.jsonl").read_text(encoding="utf-8").splitlines()]
    for tokenizer, field in (
        (finished.original, "tokens_per_character_before"),
        (finished.tokenizer, "tokens_per_character"),
    ):
        count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        assert sources["ko", "train"][field] == pytest.approx(count / sum(map(len, texts)))
    assert sources["ko", "train"]["tokens_per_character"] < 0.9 * sources["ko", "train"]["tokens_per_character_before"]
    embeddings = finished.rows * 64 * (1 if finished.tied else 2)
    assert plan["parameters"]["trained_embeddings"] == embeddings
    (table,) = [table for table in plan_tables(plan) if table.title == f"{NEW} new tokens"]
    assert list(table.columns[3].cells) == ["", "0.0% of the old language", "20.0% of the old language", ""]
    recorded = read(finished.folder / "tokenizer" / "new_tokens.json")["tokens"]
    assert [token["id"] for token in recorded] == list(range(384, 384 + NEW))
    assert [finished.tokenizer.convert_ids_to_tokens(token["id"]) for token in recorded] == [
        token["token"] for token in recorded
    ]


# --- files, and what is refused -----------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text(" 도서관이\n 강물이\n 편지를\n", encoding="utf-8")
    return file


def test_a_file_of_tokens(words: Path, llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    config = run_file(
        llama_folder,
        corpus,
        tmp_path / "run",
        model={"new_tokens": str(words)},
        training={"max_steps": 1, "warmup_steps": 0},
        evaluation={"prompts": []},
    )
    train_run(config)
    plan = read(tmp_path / "run" / "plan.json")
    assert plan["new_tokens"]["asked"] == 3 <= plan["new_tokens"]["added"] < 20
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    for word in (" 도서관이", " 강물이", " 편지를"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    shutil.rmtree(tmp_path / "run" / "final")
    text = words.read_text(encoding="utf-8")
    words.write_text(text + " 기차를\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--resume: .*words.txt \(model.new_tokens\) is not what the run began with"):
        train_run(config, resume=True)
    words.write_text(f"\n{text}\n\n", encoding="utf-8")  # the same words
    train_run(config, resume=True)
    shutil.rmtree(tmp_path / "run" / "final")
    words.unlink()  # the run has its own tokenizer
    train_run(config, resume=True)
    assert generate_run(tmp_path / "run", "the river", max_new_tokens=2).keys() == {"base", "trained"}
    assert evaluate_run(tmp_path / "run")[1]


def test_words_that_the_text_lacks_are_told(llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("도서관이\n구속영장\n대법원장\n", encoding="utf-8")
    config = run_file(llama_folder, corpus, tmp_path / "run", model={"new_tokens": str(words)})
    (warning,) = [warning for warning in plan_run(config).warnings if "do not occur" in warning]
    assert "their rows will learn nothing" in warning and "with a space (or ▁) in front" in warning


def test_learned_tokens_that_others_used_up_are_told_otherwise() -> None:
    figures = {"learned": True, "asked": 4, "added": 4, "unseen": 2, "unseen_examples": [" ab", "cd"]}
    (warning,) = warnings(figures)
    assert "' ab', 'cd'" in warning and "Longer tokens were made out of them" in warning and "file" not in warning


def test_fewer_learned_than_asked_is_told(llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    plan = plan_run(run_file(llama_folder, corpus, tmp_path / "run", model={"new_tokens": {"auto": 5000}}))
    assert plan.new_tokens is not None and plan.new_tokens["added"] < 500
    (warning,) = [warning for warning in plan.warnings if "were asked for" in warning]
    assert warning.startswith(f"5,000 new tokens were asked for, and the text gives {plan.new_tokens['added']:,}:")
    assert not (tmp_path / "run").exists()


def test_held_out_text_teaches_no_token(llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Nor does text of another role: only what is trained as the new language."""

    def tokens(**data: Any) -> list[str]:
        plan = plan_run(run_file(llama_folder, corpus, tmp_path / "run", data=data))
        assert plan.vocabulary is not None
        return list(plan.vocabulary.tokens.values())

    more = write(tmp_path / "more", {"kept": ["바람개비 " * 50] * 20})
    sources = [{"path": str(corpus / "ko.jsonl")}]
    plain = tokens(sources=sources)
    for role in ("replay", "heldout"):
        assert tokens(sources=[*sources, {"path": str(more / "kept.jsonl"), "role": role}]) == plain
    assert tokens(sources=[*sources, {"path": str(more / "kept.jsonl")}]) != plain


def test_nothing_to_learn(llama_folder: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "corpus", {"ko": ["다람쥐 헌 쳇바퀴"]})
    config = run_file(
        llama_folder, folder, tmp_path / "run", data={"sources": [{"path": str(folder / "ko.jsonl")}], "holdout": 0.0}
    )
    with pytest.raises(UserError, match=r"model.new_tokens.auto: no two tokens stand side by side"):
        plan_run(config)


@pytest.mark.parametrize("given", [0, -5, {"auto": 0}, {"auto": "many"}, {"auto": True}, {"auto": 5, "of": 6}, "", []])
def test_a_setting_that_says_nothing_is_refused(given: Any, llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.new_tokens: .* is not valid\. Give a file with one token a line"):
        run_file(llama_folder, corpus, tmp_path / "run", model={"new_tokens": given})


def test_frozen_embeddings_are_refused(llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.new_tokens: new tokens need trained embeddings"):
        run_file(llama_folder, corpus, tmp_path / "run", adapter={"modules_to_save": []})
    config = run_file(llama_folder, corpus, tmp_path / "run", adapter={"modules_to_save": ["embed_tokens"]})
    with pytest.raises(UserError, match=r"^adapter\.modules_to_save: .*lm_head would stay frozen"):
        plan_run(config)


def test_a_relative_file_is_found_from_any_folder(
    words: Path, llama_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(words.parent)
    config = run_file(llama_folder, corpus, tmp_path / "run", model={"new_tokens": words.name})
    assert config.model.new_tokens == str(words)
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_branch_keeps_the_tokens_of_its_parent(
    llama_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other text, from which others would be learned; with the rows that they began with."""
    short = {"max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train_run(run_file(llama_folder, corpus, tmp_path / "run", training=short, evaluation={"prompts": []}))
    more = write(tmp_path / "more", {"ko": [f"바람개비 {text}" for text in documents("ko", 60)]})
    config = run_file(
        llama_folder,
        corpus,
        tmp_path / "branch",
        data={"sources": [{"path": str(more / "ko.jsonl")}], "holdout": 0.2},
        training=short,
        evaluation={"prompts": []},
    )
    monkeypatch.setattr("steep.model.new_tokens._fill", lambda *given: pytest.fail("made again"))
    file = tmp_path / "run" / "tokenizer" / NEW_ROWS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"^run folder: {file} is damaged: .*. Put it back: tokenizer/"):
        train_run(config, branch=tmp_path / "run" / "checkpoint-1")
    file.write_bytes(whole)
    train_run(config, branch=tmp_path / "run" / "checkpoint-1")
    copies = [tmp_path / "branch" / name / NEW_ROWS for name in ("tokenizer", "checkpoint-2", "checkpoint-3")]
    assert [copy.read_bytes() for copy in copies] == [whole] * 3
    tokenizers = [read(tmp_path / name / "tokenizer" / "tokenizer.json") for name in ("run", "branch")]
    assert tokenizers[0] == tokenizers[1]
    assert (
        evaluate_run(tmp_path / "branch")[1] and read(tmp_path / "branch" / "plan.json")["new_tokens"]["added"] == NEW
    )


def test_a_budget_is_counted_in_the_models_own_tokens(llama_folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Both tokenizers read the same documents, or base and trained model would be scored on different ones."""
    sources = [{"path": str(corpus / "ko.jsonl"), "max_tokens": 4000}]
    given = run_file(llama_folder, corpus, tmp_path / "run", data={"sources": sources, "holdout": 0.3})
    own = run_file(
        llama_folder,
        corpus,
        tmp_path / "run",
        data={"sources": sources, "holdout": 0.3},
        model={"new_tokens": None},
    )
    grown, plain = plan_run(given), plan_run(own)
    with_new, without = (plan.corpus.statistics["sources"][0] for plan in (grown, plain))
    assert with_new["documents"] == without["documents"] < 100
    assert with_new["tokens"] < 0.9 * without["tokens"] <= 0.9 * 4000
    assert grown.vocabulary is not None
    (documents,) = grown.vocabulary.base_documents(grown.corpus, max_tokens=None).values()
    (expected,) = plain.corpus.heldout.values()
    assert [document.num_bytes for document in documents] == [document.num_bytes for document in expected]
    assert all(map(np.array_equal, (one.tokens for one in documents), (other.tokens for other in expected)))
