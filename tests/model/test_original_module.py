"""The originals of trained embeddings are read from the base's files: same bits, no memory, no surprise."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steep.data.packing import pack
from steep.data.sources import Source
from steep.errors import RunError
from steep.evaluation.adapters import base_model
from steep.evaluation.perplexity import evaluate
from steep.generation import generate_side_by_side
from steep.model import checksum, frozen_matrix
from steep.model.adapters import add_adapters, all_tensors, open_adapter, save_adapter
from steep.model.base_tensors import BaseTensors
from steep.model.embeddings import is_tied, untie
from steep.model.frozen_matrix import FrozenMatrix
from steep.model.install import fused_of, install
from steep.model.load import DTYPES, load
from steep.model.new_tokens import grow_embeddings, grow_tokenizer
from steep.model.original_module import OriginalEmbedding, OriginalHead, OriginalModule, offload_originals
from steep.training.proof import frozen_checksums
from tests.evaluation.oracle import random_documents
from tests.tiny import documents, save_tiny, tiny_model, tiny_tokenizer
from tests.training.helpers import losses, trainer_for

DOCUMENTS = random_documents(2, 33, 70, 20)
CASES = [
    ("llama", True, "fp32"),
    ("llama", False, "fp32"),
    ("gemma3", True, "fp32"),
    ("gemma3", False, "bf16"),  # the scale is a buffer that is cast, and rows are cast from the file's fp32
    ("llama", False, "bf16"),
    ("llama", True, "nf4"),
    ("gemma2", True, "nf4"),
]


def ids(highest: int = 384) -> torch.Tensor:
    tokens = torch.randint(0, highest, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[0, :3] = torch.tensor([0, highest - 1, 0])  # padding, the last row, one twice
    return tokens


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return model.eval()(input_ids=ids() if tokens is None else tokens, use_cache=False).logits


def adapted(base: Any, **settings: Any) -> PeftModel:
    """`base` with adapters and trained copies that are not where they began."""
    model = add_adapters(base, **{"r": 4, **settings})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def original_modules(model: nn.Module) -> dict[str, OriginalModule]:
    return {
        name.rpartition("original_module")[0].split(".")[-2]: module
        for name, module in model.named_modules()
        if isinstance(module, OriginalModule)
    }


def folder_of(tmp_path: Path, family: str = "llama", tied: bool = False) -> Path:
    return save_tiny(family, tmp_path / "base", tied)


@pytest.mark.parametrize(("family", "tied", "kind"), CASES)
def test_computes_what_the_base_computed(family: str, tied: bool, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, family, tied)
    base, _ = load(str(folder), base=kind)
    plain = logits(base)
    model = adapted(base, trained_dtype="bf16" if kind == "bf16" else "fp32")
    in_memory, trained = copy.deepcopy(model), logits(model)
    before, checksums = all_tensors(model), frozen_checksums(model)

    assert offload_originals(model) is model
    originals = original_modules(model)
    assert {name: type(module) for name, module in originals.items()} == {
        "embed_tokens": OriginalEmbedding,
        "lm_head": OriginalHead,
    }
    assert all(module.matrix.file == folder / "model.safetensors" for module in originals.values())
    assert (originals["embed_tokens"].matrix is originals["lm_head"].matrix) is tied
    assert not [name for module in originals.values() for name, _ in module.named_parameters()]
    gone = before.keys() - all_tensors(model).keys()
    assert {name for name in gone if name.endswith(".weight")} == {
        f"base_model.model.{name}.original_module.weight" for name in ("model.embed_tokens", "lm_head")
    }

    assert torch.equal(logits(model), trained)
    with model.disable_adapter():
        got = logits(model)
        assert got.dtype == plain.dtype and torch.equal(got, plain)
    with in_memory.disable_adapter():
        assert torch.equal(logits(in_memory), plain)
    assert torch.equal(logits(model), trained)

    now = {name.replace("shell.", ""): digest for name, digest in frozen_checksums(model).items()}
    assert frozen_checksums(model, of_files=True) == frozen_checksums(model)
    assert now == checksums  # so a checkpoint of a run that had them in memory goes on


@pytest.mark.parametrize("fused", [False, True])
def test_the_head_is_read_once_and_freed(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the table never: its rows are gathered."""
    model = offload_originals(adapted(load(str(folder_of(tmp_path)), base="fp32")[0]))
    if fused:
        install(model)
    head: Any = original_modules(model)["lm_head"]
    reads: list[str] = []
    read = BaseTensors.__getitem__
    monkeypatch.setattr(BaseTensors, "__getitem__", lambda self, name: (reads.append(name), read(self, name))[1])
    logits(model)
    assert reads == []
    with model.disable_adapter():
        for _ in range(3):
            logits(model)
        assert head._held is not None and original_modules(model)["embed_tokens"]._held is None
    assert head._held is None
    assert sorted(reads) == ["lm_head.weight"] + 3 * ["model.embed_tokens.weight"]
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        logits(model)
        raise ZeroDivisionError
    assert head._held is None


@pytest.mark.parametrize("trained_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_before_training_the_copies_are_lent(
    tied: bool, trained_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no head is read, and in bf16 none is there twice; the scores are the base's to the bit."""
    base, _ = load(str(folder_of(tmp_path, tied=tied)), base="bf16")
    model = install(add_adapters(base, r=4, trained_dtype=trained_dtype, offloads=True))
    scores, modules = [], original_modules(model)
    lent: dict[str, Any] = {}
    for untrained in (False, True):
        with base_model(model, untrained=untrained):
            scores.append(evaluate(model, {"d": DOCUMENTS}, max_length=64))
            lent = {name: module._held for name, module in modules.items()}
        assert all(module._held is None for module in modules.values())
    assert scores[0] == scores[1]
    copies = model.get_base_model().model.embed_tokens.modules_to_save["default"].weight
    assert lent["embed_tokens"].dtype == torch.bfloat16
    assert (lent["embed_tokens"].data_ptr() == copies.data_ptr()) == (trained_dtype == "bf16")
    monkeypatch.setattr(FrozenMatrix, "whole", lambda *_: pytest.fail("a matrix was read"))
    with base_model(model, untrained=True):
        evaluate(model, {"d": DOCUMENTS}, max_length=64)


@pytest.mark.parametrize("tied", [True, False])
def test_moves_and_casts_go_along(tied: bool, tmp_path: Path, korean_corpus: Path) -> None:
    model = offload_originals(adapted(load(str(folder_of(tmp_path, "gemma3", tied)), base="fp32")[0]))
    with model.disable_adapter():
        plain = logits(model)
        model.to(torch.bfloat16)
        assert original_modules(model)["lm_head"].weight.dtype == torch.bfloat16
        in_bf16 = logits(model)
    expected = load(str(tmp_path / "base"), base="fp32")[0].to(torch.bfloat16)
    assert torch.equal(in_bf16, logits(expected)) and not torch.equal(in_bf16.float(), plain)
    corpus = pack([Source(path=str(korean_corpus))], tiny_tokenizer(), max_length=64)
    trainer_for(model, corpus, tmp_path / "run")._move_model_to_device(model, torch.device("meta"))
    assert all(module.weight.device.type == "meta" for module in original_modules(model).values())
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_copies_and_pickles(tied: bool, tmp_path: Path) -> None:
    model = offload_originals(adapted(load(str(folder_of(tmp_path, "gemma3", tied)), base="fp32")[0]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        with model.disable_adapter(), other.disable_adapter():
            assert torch.equal(logits(other), logits(model))
        assert frozen_checksums(other) == frozen_checksums(model)
    assert frozen_checksums(offload_originals(model)) == frozen_checksums(model)  # a second time changes nothing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_merges_and_unloads(tied: bool, merge: bool, tmp_path: Path) -> None:
    model = adapted(load(str(folder_of(tmp_path, "gemma3", tied)), base="fp32")[0])
    in_memory = copy.deepcopy(model)
    offload_originals(model)
    merged: list[Any] = [m.merge_and_unload() if merge else m.unload() for m in (model, in_memory)]  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits(merged[0]), logits(merged[1]))
    assert merged[0].state_dict().keys() == merged[1].state_dict().keys()
    assert is_tied(merged[0]) is is_tied(merged[1]) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_unloading_without_an_adapter_gives_the_base_back(tied: bool, tmp_path: Path) -> None:
    base, _ = load(str(folder_of(tmp_path, "gemma3", tied)), base="fp32")
    plain, names = logits(base), base.state_dict().keys()
    model = offload_originals(adapted(base))
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), plain)
    back: Any = model.unload()  # pyright: ignore[reportCallIssue]
    assert torch.equal(logits(back), plain) and back.state_dict().keys() == names
    assert is_tied(back) is tied
    assert type(back.get_input_embeddings()) is type(tiny_model("gemma3").get_input_embeddings())
    assert type(back.get_output_embeddings()) is nn.Linear
    assert back.get_input_embeddings().padding_idx == 0


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # PEFT looks for the names before
@pytest.mark.parametrize("tied", [True, False])
def test_another_adapter_begins_at_the_base(tied: bool, tmp_path: Path) -> None:
    base, _ = load(str(folder_of(tmp_path, "gemma3", tied)), base="fp32")
    plain = logits(base)
    model = adapted(base)
    save_adapter(model, tmp_path / "saved")
    in_memory = copy.deepcopy(model)
    offload_originals(model)
    for each in (model, in_memory):
        each.add_adapter("second", copy.deepcopy(each.peft_config["default"]))
        each.set_adapter("second")
        assert torch.equal(logits(each), plain)
        each.load_adapter(str(tmp_path / "saved"), "third")
        each.set_adapter("third")
    assert torch.equal(logits(model), logits(in_memory))  # PEFT leaves the head of a tied pair behind
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_opens_with_peft(tied: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", tied)
    model = adapted(load(str(folder), base="fp32")[0])
    save_adapter(model, tmp_path / "before")
    offload_originals(model)
    save_adapter(model, tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    opened = PeftModel.from_pretrained(load(str(folder), base="fp32")[0], str(tmp_path / "after"))
    assert torch.equal(logits(opened), logits(model))
    offload_originals(opened)
    with opened.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_stay_in_memory(tied: bool, tmp_path: Path) -> None:
    folder, tokenizer = folder_of(tmp_path, "gemma3", tied), tiny_tokenizer()
    grown = grow_tokenizer(tokenizer, tmp_path / "grown", texts=documents("ko", 100), number=40)
    base, _ = load(str(folder), base="fp32")
    grow_embeddings(base, tokenizer, grown)
    plain = logits(base, ids(424))
    model = adapted(base)
    in_memory = copy.deepcopy(model)
    offload_originals(model)
    matrices = {module.matrix for module in original_modules(model).values()}
    assert len(matrices) == (1 if tied else 2)
    assert all(matrix.file and matrix._own_rows.shape == (40, 64) for matrix in matrices)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids(424)), plain)
    untouched = evaluate(load(str(folder), base="fp32")[0], {"d": DOCUMENTS}, max_length=32)
    with base_model(model, 384):
        assert evaluate(model, {"d": DOCUMENTS}, max_length=32) == untouched
        assert logits(model).shape[-1] == 384
    completions = [
        generate_side_by_side(m, grown, "the river", base_tokenizer=tokenizer, max_new_tokens=8)
        for m in (model, in_memory)
    ]
    assert completions[0] == completions[1]
    assert frozen_checksums(in_memory).keys() - frozen_checksums(model).keys() <= {
        "base_model.model.model.embed_tokens.original_module.embed_scale"
    }
    assert frozen_checksums(model, of_files=True) == frozen_checksums(model)


def test_a_row_of_the_file_that_was_changed_stays_in_memory(tmp_path: Path) -> None:
    """Many checkpoints have rows to spare, which new tokens take."""
    base, _ = load(str(folder_of(tmp_path)), base="fp32")
    base.get_input_embeddings().weight.data[[7, 383]] += 1
    plain = logits(base)
    model = offload_originals(adapted(base))
    table = original_modules(model)["embed_tokens"].matrix
    assert table._own_ids.tolist() == [7, 383]
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_a_head_of_its_own_over_a_tied_base_is_the_table(tmp_path: Path) -> None:
    base, _ = load(str(folder_of(tmp_path, "llama", tied=True)), base="fp32")
    plain = logits(base)
    untie(base)
    model = offload_originals(adapted(base))
    originals = original_modules(model)
    assert originals["lm_head"].matrix is originals["embed_tokens"].matrix
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("only", ["embed_tokens", "lm_head"])
def test_one_embedding_alone(only: str, tmp_path: Path) -> None:
    base, _ = load(str(folder_of(tmp_path)), base="fp32")
    plain = logits(base)
    model = offload_originals(adapted(base, modules_to_save=[only]))
    assert [*original_modules(model)] == [only]
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["no file", "another model's file"])
def test_without_a_file_the_original_stays_in_host_memory(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base: Any = tiny_model("gemma3", tied=True)
    if kind == "another model's file":
        base.config._name_or_path = str(save_tiny("gemma3", tmp_path, tied=True, seed=1))
    plain = logits(base)
    model = adapted(base)
    checksums = frozen_checksums(model)
    with caplog.at_level("INFO", logger="steep"):
        offload_originals(model)
    told = [record.message for record in caplog.records if "frozen original" in record.message]
    assert told == [
        "no file holds the frozen original of model.embed_tokens: it is kept in host memory (0.00 GiB)"
    ]  # once for a tied pair
    assert not [name for name, _ in model.named_parameters() if "original_module" in name]
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert {name.replace("shell.", ""): digest for name, digest in frozen_checksums(model).items()} == checksums


@pytest.mark.parametrize("fused", [True, False])
def test_fused_forward_reads_the_head(fused: bool, tmp_path: Path) -> None:
    base, _ = load(str(folder_of(tmp_path)), base="fp32")
    tokens = ids()
    plain = base.eval()(input_ids=tokens, labels=tokens, use_cache=False).loss
    model: Any = offload_originals(adapted(base))
    if fused:
        install(model)
    with model.disable_adapter(), torch.no_grad():
        loss = model.eval()(input_ids=tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=0)
    if fused:
        how = fused_of(model)
        assert how.calls == 1 and all("gives no logits" in reason for reason in how.said)


def test_ids_that_are_no_rows(tmp_path: Path) -> None:
    model = offload_originals(adapted(load(str(folder_of(tmp_path)), base="fp32")[0]))
    embedding = original_modules(model)["embed_tokens"]
    for wrong in (-1, 384):
        with pytest.raises(IndexError):
            embedding(torch.tensor([[5, wrong]]))
    assert embedding(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, 64)


# --- the file changes -----------------------------------------------------------------------------------------------


def overwrite(file: Path, change: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def bump(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5] += 1

    return change


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_other_numbers_in_the_file_are_an_error(name: str, tmp_path: Path) -> None:
    file = folder_of(tmp_path) / "model.safetensors"
    model = offload_originals(adapted(load(str(file.parent), base="fp32")[0]))
    checksums = frozen_checksums(model)
    trained = logits(model)
    overwrite(file, bump(name))
    with pytest.raises(RunError, match=f"{file} was changed while it is in use: {name}"), model.disable_adapter():
        logits(model)
    now = frozen_checksums(model, of_files=True)
    assert [tensor for tensor in checksums if now[tensor] != checksums[tensor]] == [
        f"base_model.model.{name.removesuffix('weight')}original_module.weight"
    ]
    assert torch.equal(logits(model), trained)  # training reads nothing of it


def test_a_file_written_anew_with_the_same_numbers_is_the_same(tmp_path: Path) -> None:
    file = folder_of(tmp_path) / "model.safetensors"
    base, _ = load(str(file.parent), base="fp32")
    plain = logits(base)
    model = offload_originals(adapted(base))
    overwrite(file, lambda tensors: tensors.update(extra=torch.zeros(1000)))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("damage", ["gone", "cut", "without the tensor"])
def test_a_file_that_cannot_be_read_any_more(damage: str, tmp_path: Path) -> None:
    file = folder_of(tmp_path) / "model.safetensors"
    model = offload_originals(adapted(load(str(file.parent), base="fp32")[0]))
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        overwrite(file, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(RunError, match=f"{file}, which is in use, cannot be read any more"), model.disable_adapter():
        logits(model)
    now = frozen_checksums(model, of_files=True)
    assert "cannot be read" in now["base_model.model.model.embed_tokens.original_module.weight"]


def test_second_config_is_plain_lora(tmp_path: Path) -> None:
    """An adapter that trains no embedding leaves the originals in use."""
    base, _ = load(str(folder_of(tmp_path)), base="fp32")
    plain = logits(base)
    model = offload_originals(adapted(base))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert torch.equal(logits(model), plain)


# --- in training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3", True)])
def test_trains_and_saves_the_same(family: str, tied: bool, korean_corpus: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, family, tied)
    corpus = pack([Source(path=str(korean_corpus))], tiny_tokenizer(), max_length=64)
    made: list[Any] = []
    for name in ("in memory", "offloaded"):
        torch.manual_seed(1)
        model = add_adapters(load(str(folder), base="fp32")[0], r=4)
        if name == "offloaded":
            offload_originals(model)
        trainer = trainer_for(model, corpus, tmp_path / name, save_strategy="steps", save_steps=3)
        trainer.train()
        made.append(trainer)
    before, now = made
    assert losses(before) == losses(now)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        for step in (3, 6):
            left, right = (
                each / f"checkpoint-{step}" / file for each in (tmp_path / "in memory", tmp_path / "offloaded")
            )
            assert left.read_bytes() == right.read_bytes()
    reports = [trainer.proof.report() for trainer in made]
    assert reports[0] == reports[1] and reports[0]["ok"]
    now.proof._changed = None
    overwrite(folder / "model.safetensors", bump("model.embed_tokens.weight"))
    assert now.proof.report()["frozen_changed"] == ["base_model.model.model.embed_tokens.original_module.weight"]


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "tied", "kind"), [*CASES, ("gemma3", False, "nf4"), ("llama", True, "bf16")])
def test_on_a_gpu_the_originals_are_not_there(family: str, tied: bool, kind: str, tmp_path: Path) -> None:
    base, _ = load(str(save_tiny(family, tmp_path / "base", tied, vocab_size=8192)), base=kind)
    tokens = ids(8192).cuda()
    plain = logits(base, tokens)
    model = adapted(base, trained_dtype="bf16" if kind == "bf16" else "fp32")
    checksums = frozen_checksums(model)
    size = base.get_input_embeddings().original_module.weight.nbytes
    gc.collect()  # what lies about would be freed in between
    before = torch.cuda.memory_allocated()
    offload_originals(model)
    assert before - torch.cuda.memory_allocated() == size * (1 if tied else 2)
    head: Any = original_modules(model)["lm_head"]
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), plain)
        assert head._held.device.type == "cuda"
    assert head._held is None
    assert before - torch.cuda.memory_allocated() == size * (1 if tied else 2)
    assert {name.replace("shell.", ""): digest for name, digest in frozen_checksums(model).items()} == checksums


class _Live(TorchDispatchMode):
    """The most bytes that tensors had at a time which operations gave within."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, dict[int, tuple[StorageWeakRef, int]]()
        self._maps = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.set_.source_Storage:
            self._maps.add(made.untyped_storage().data_ptr())  # of a file
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.device.type != "meta"
                and tensor.untyped_storage().data_ptr() not in self._maps
            ):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {place: (ref, size) for place, (ref, size) in self._alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_no_untied_embedding_is_there_twice(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What putting adapters on takes at its peak: they themselves, and the embeddings if they change their dtype."""
    monkeypatch.setattr(frozen_matrix, "_AT_ONCE", 2**12)
    monkeypatch.setattr(checksum, "_CHUNK", 2**12)
    folder, taken = str(folder_of(tmp_path, tied=False)), []
    for offloads in (True, False):
        base = load(folder, base="bf16")[0]
        of_table = base.get_input_embeddings().weight.nbytes
        with _Live() as live:
            model = add_adapters(base, r=4, trained_dtype=dtype, offloads=offloads)
            offload_originals(model)
        adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        taken.append((live.most - adapters) / of_table)
        trained = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
        assert len(trained) == 2 and all(p.requires_grad and p.device.type == "cpu" for p in trained.values())
        plain = load(folder, base="bf16")[0]
        tables = {"embed_tokens": plain.get_input_embeddings(), "lm_head": plain.get_output_embeddings()}
        for name, parameter in trained.items():
            whose = next(each for each in tables if each in name)
            assert parameter.dtype == DTYPES[dtype] and torch.equal(parameter, tables[whose].weight.to(parameter.dtype))
            with torch.no_grad():
                parameter.mul_(2)
            assert torch.equal(original_modules(model)[whose].weight, tables[whose].weight)
    lean, whole = taken
    assert lean < (5.5 if dtype == "fp32" else 2.5) and whole > lean + 0.9  # two tables; in fp32, and one as it was


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"]], ids=len)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_untied_model_trains_two_tables(dtype: str, saved: list[str], tmp_path: Path) -> None:
    """They have one memory until adapters are put on, new ones or those that are saved."""
    folder = str(folder_of(tmp_path, tied=True))

    def untied() -> Any:
        base = load(folder, base=dtype)[0]
        untie(base)
        return base

    model = add_adapters(untied(), r=4, modules_to_save=saved, trained_dtype=dtype, offloads=True)
    memories = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(memories)) == len(memories)
    trained = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(trained) == len(saved)
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            parameter.fill_(number + 1)
    assert [p.unique().tolist() for p in trained.values()] == [[number + 1] for number in range(len(saved))]
    plain = load(folder, base=dtype)[0].get_input_embeddings().weight
    for name in saved:
        assert torch.equal(original_modules(model)[name].weight, plain)
    if saved == ["lm_head"]:
        base: Any = model.get_base_model()
        assert torch.equal(base.get_input_embeddings().weight, plain)
    save_adapter(model, tmp_path / "saved")
    opened = open_adapter(untied(), tmp_path / "saved", trained_dtype=dtype, offloads=True)
    again = {name: p for name, p in opened.named_parameters() if "modules_to_save" in name}
    assert all(torch.equal(again[name], parameter) for name, parameter in trained.items())
