"""The file with the rows that new tokens begin with: their bits, nothing else, and no damage that is not noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steep.data.packing import pack
from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.embeddings import is_tied
from steep.model.load import load
from steep.model.new_rows import NEW_ROWS, NewRows, new_rows_of, read_new_rows
from steep.model.new_tokens import grow_embeddings, grow_tokenizer
from steep.model.original_module import OriginalModule
from steep.training.checkpoint import inspect
from tests.tiny import documents, save_tiny, tiny_model, tiny_tokenizer, write_corpus
from tests.training.helpers import trainer_for

NEW = 40


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("grown")
    return grow_tokenizer(tiny_tokenizer(), folder, texts=documents("ko", 100), number=NEW)


def weights(model: Any) -> dict[str, torch.Tensor]:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {"embed_tokens": table} if is_tied(model) else {"embed_tokens": table, "lm_head": head}


def written(model: Any, folder: Path) -> Path:
    rows = new_rows_of(model)
    assert rows is not None
    (folder / NEW_ROWS).write_bytes(rows.to_bytes())
    return folder / NEW_ROWS


def marked(file: Path) -> dict[str, torch.Tensor]:
    """Write other rows into `file`, and return them: who makes rows again does not have these."""
    rows = read_new_rows(file)
    others = {name: table + 1 for name, table in rows.tables.items()}
    file.write_bytes(NewRows(rows.ids, others).to_bytes())
    return others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_has_the_rows_to_the_bit_and_nothing_else(
    tied: bool, dtype: torch.dtype, grown: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", tied).to(dtype)  # pyright: ignore[reportArgumentType]
    grow_embeddings(model, tiny_tokenizer(), grown)
    file = written(model, tmp_path)
    stored = load_file(file)
    assert stored.pop("ids").tolist() == list(range(384, 384 + NEW))
    assert stored.keys() == weights(model).keys()
    for name, weight in weights(model).items():
        assert stored[name].dtype == dtype and torch.equal(stored[name], weight[384:])
        assert stored[name].abs().sum() > 0
    values = NEW * (8 + len(stored) * 64 * dtype.itemsize)
    assert values < file.stat().st_size < values + 700
    assert file.read_bytes() == NewRows(torch.arange(384, 384 + NEW), stored).to_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_read_and_not_made(tied: bool, grown: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tied)
    grow_embeddings(model, tiny_tokenizer(), grown)
    file = written(model, tmp_path)
    others = marked(file)
    monkeypatch.setattr("steep.model.new_tokens._fill", lambda *_: pytest.fail("made again"))
    model, before = tiny_model("llama", tied), weights(tiny_model("llama", tied))
    grow_embeddings(model, tiny_tokenizer(), grown, file)
    assert is_tied(model) is tied and not any(parameter.requires_grad for parameter in model.parameters())
    for name, weight in weights(model).items():
        assert torch.equal(weight[384:], others[name]) and torch.equal(weight[:384], before[name])
    assert written(model, tmp_path).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_adapters_the_rows_are_those_of_the_file(family: str, tied: bool, grown: Any, tmp_path: Path) -> None:
    """With Gemma's scale, and its padding among the ids."""
    folder = save_tiny(family, tmp_path / "base", tied)
    base, _ = load(str(folder), base="fp32")
    grow_embeddings(base, tiny_tokenizer(), grown)
    others = marked(file := written(base, tmp_path))

    def opened() -> Any:
        model, _ = load(str(folder), base="fp32")
        grow_embeddings(model, tiny_tokenizer(), grown, file)
        return model

    tokens = torch.tensor([[0, 384, 423, 5, 0, 400]])
    with torch.no_grad():
        plain = opened().eval()(input_ids=tokens, use_cache=False).logits
        model = add_adapters(opened(), r=4, offloads=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        originals = [module for module in model.modules() if isinstance(module, OriginalModule)]
        assert len(originals) == 2
        for original, name in zip(
            originals, ["embed_tokens"] * 2 if tied else ["embed_tokens", "lm_head"], strict=True
        ):
            assert original.matrix.file == folder / "model.safetensors"
            assert torch.equal(original.weight[384:], others[name])
        with model.disable_adapter():
            assert torch.equal(model.eval()(input_ids=tokens, use_cache=False).logits, plain)
        assert not torch.equal(model(input_ids=tokens, use_cache=False).logits, plain)


def test_rows_that_no_new_token_has_are_in_it_where_the_base_lacks_them(grown: Any, tmp_path: Path) -> None:
    """A base may have fewer rows than its own tokenizer has ids; what transformers draws for them is drawn once."""
    models = [tiny_model("llama", tied=False, vocab_size=380) for _ in range(3)]
    grow_embeddings(models[0], tiny_tokenizer(), grown)
    grow_embeddings(models[2], tiny_tokenizer(), grown)
    assert not any(
        torch.equal(*pair) for pair in zip(weights(models[0]).values(), weights(models[2]).values(), strict=True)
    )
    file = written(models[0], tmp_path)
    assert read_new_rows(file).ids.tolist() == list(range(380, 384 + NEW))
    grow_embeddings(models[1], tiny_tokenizer(), grown, file)
    for one, other in zip(weights(models[0]).values(), weights(models[1]).values(), strict=True):
        assert torch.equal(one, other)


def test_rows_to_spare_that_new_tokens_take_are_in_it(grown: Any) -> None:
    model = tiny_model("llama", tied=False, vocab_size=512)
    grow_embeddings(model, tiny_tokenizer(), grown)
    rows = new_rows_of(model)
    assert rows is not None and rows.ids.tolist() == list(range(384, 384 + NEW))


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / NEW_ROWS
    whole = NewRows(torch.tensor([5, 9]), {"embed_tokens": torch.randn(2, 3), "lm_head": torch.randn(2, 3)}).to_bytes()
    file.write_bytes(whole)
    assert read_new_rows(file).ids.tolist() == [5, 9]
    for place in range(len(whole)):
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            file.write_bytes(changed)
            with pytest.raises(UserError, match=rf"^run folder: {file} is damaged: .* Put it back: tokenizer/"):
                read_new_rows(file)
    for content in (whole[:-1], whole[:20], b"", whole + b"\0"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^run folder: {file} is damaged: "):
            read_new_rows(file)
    file.unlink()
    with pytest.raises(
        UserError, match=rf"^run folder: {file}, the rows .* is not there. .* An older steep wrote none"
    ):
        read_new_rows(file)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"tied": False}, "it holds embed_tokens 40 x 64 and lm_head 40 x 64, where .* need embed_tokens 40 x 64"),
        (
            {"hidden_size": 32},
            "it holds embed_tokens 40 x 32, where the model and its tokenizer need embed_tokens 40 x 64",
        ),
        ({"vocab_size": 380}, "it holds embed_tokens 44 x 64, where"),
        ({"ids": 1}, "it holds rows of other ids"),
    ],
)
def test_the_file_of_another_model_is_refused(other: dict[str, Any], problem: str, grown: Any, tmp_path: Path) -> None:
    shift = other.pop("ids", 0)
    theirs = tiny_model("llama", **{"tied": True, **other})
    grow_embeddings(theirs, tiny_tokenizer(), grown)
    file = written(theirs, tmp_path)
    rows = read_new_rows(file)
    file.write_bytes(NewRows(rows.ids + shift, rows.tables).to_bytes())
    with pytest.raises(UserError, match=f"{file} is of another model or of other new tokens: {problem}"):
        grow_embeddings(tiny_model("llama", tied=True), tiny_tokenizer(), grown, file)


@pytest.mark.parametrize("is_grown", [True, False])
def test_checkpoints_of_a_script_have_it(is_grown: bool, grown: Any, tmp_path: Path) -> None:
    model: Any = tiny_model("llama", tied=True)
    model.config.use_cache = False
    if is_grown:
        grow_embeddings(model, tiny_tokenizer(), grown)
    begun = model.get_input_embeddings().weight[384:].clone()
    texts = write_corpus(tmp_path / "texts", 20)
    corpus = pack(texts, grown if is_grown else tiny_tokenizer(), max_length=64, cache_dir=tmp_path / "tokens")
    trainer_for(add_adapters(model, r=4), corpus, tmp_path, save_strategy="steps", save_steps=3).train()
    for step in (3, 6):
        file = tmp_path / f"checkpoint-{step}" / NEW_ROWS
        assert file.exists() is is_grown
        if is_grown:
            assert torch.equal(read_new_rows(file).tables["embed_tokens"], begun)
            assert NEW_ROWS in inspect(file.parent).files
