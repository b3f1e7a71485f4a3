"""GGUF files as base models: what comes out is what went in, and what cannot be read right is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from transformers import Phi3Config, PreTrainedModel, PreTrainedTokenizerBase

from steep.data.encoder import Encoder
from steep.errors import UserError
from steep.export import gguf
from steep.export.gguf import GgufModel, open_model, write_gguf
from steep.export.gguf_tokenizer import Vocabulary, add_vocabulary
from steep.model import gguf as reading
from steep.model import gguf_vocabulary
from steep.model.empty import empty_model
from steep.model.gguf import converted_folder
from steep.model.gguf_fidelity import check_config
from steep.model.gguf_file import GgufFile, read_gguf
from steep.model.load import load
from steep.model.pre_tokenizers import pre_tokenizer_called
from steep.model.resolve import read_tokenizer, resolve
from steep.model.stored_weights import check_stored
from tests.export.gguf_texts import TEXTS
from tests.export.tokenizers_of_kinds import byte_level, sentencepiece_style
from tests.tiny import EOS, tiny_model, tiny_tokenizer

NOT_LEADING_WITH_SPACE = [text for text in TEXTS if not text.startswith((" ", "▁"))]


def written(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    keys: Mapping[str, Any] | None = None,
    without: str | None = None,
    **vocabulary: Any,
) -> Path:
    """`model` in f16.

    Args:
        tokenizer: the tests' with BOS if it is None.
        keys: of the file, in place of those that steep writes; None: left out.
        without: tensors whose names begin with this are left out.
        vocabulary: fields of the `Vocabulary`, in place of the tokenizer's.
    """
    model.save_pretrained(folder / "model")
    (tokenizer or tiny_tokenizer(bos=True)).save_pretrained(folder / "model")

    def opened(place: Path) -> GgufModel:
        whole = open_model(place)
        names = {name: own for name, own in whole.names.items() if without is None or not name.startswith(without)}
        return replace(whole, names=names, vocabulary=replace(whole.vocabulary, **vocabulary))

    def add_last(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
        add_vocabulary(writer, vocabulary)
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        for key, value in (keys or {}).items():
            writer.kv_data[0].pop(key, None)
            if value is not None:
                getattr(writer, f"add_{kinds[type(value)]}")(key, value)

    with pytest.MonkeyPatch.context() as patch:  # steep itself writes no such files
        patch.setattr(gguf, "open_model", opened)
        patch.setattr(gguf, "add_vocabulary", add_last)
        return write_gguf(folder / "model", folder, "tiny")[0]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", tied=False)


@pytest.fixture(scope="module")
def gguf_file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(model, tmp_path_factory.mktemp("gguf"))


def test_the_model_is_the_one_in_the_file(model: PreTrainedModel, gguf_file: Path) -> None:
    loaded, tokenizer = load(str(gguf_file), base="fp32", compute_dtype="fp32")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected, logits = model(ids).logits, loaded(ids).logits
    # The conversion rounds the weights to bf16.
    assert (logits - expected).norm() < 0.02 * expected.norm()
    text = "강물이 the river"
    assert tokenizer(text)["input_ids"][-5:] == tiny_tokenizer()(text)["input_ids"][-5:]


def test_a_converted_file_is_not_parsed_again(gguf_file: Path) -> None:
    load(str(gguf_file), base="fp32", compute_dtype="fp32")
    resolved = resolve(str(gguf_file))
    assert resolved.name == str(converted_folder(gguf_file))
    assert "gguf_file" not in resolved.arguments
    assert read_tokenizer(resolved).eos_token == EOS


def test_another_way_to_convert_has_another_folder(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = converted_folder(gguf_file)
    monkeypatch.setattr(reading, "_VERSION", 1)
    assert converted_folder(gguf_file) != now


# --- the model ------------------------------------------------------------------------------------------------


def gemma(kind: str, layers: int, period: int, **fields: Any) -> PreTrainedModel:
    """Gemma 2 or 3 with the windows, heads and scale of attention that transformers' reader takes for granted."""
    windows = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    defaults = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": layers, "layer_types": windows}
    return tiny_model(kind, **defaults | fields)


def gemma3_rope(**full: Any) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return {"full_attention": {"rope_type": "default", "rope_theta": 1e6} | full, "sliding_attention": plain}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_what_is_read_right_is_the_model_in_the_file(family: str, tmp_path: Path) -> None:
    made = {
        "qwen2": lambda: tiny_model("qwen2"),
        "qwen3": lambda: tiny_model("qwen3", head_dim=128),
        "gemma2": lambda: gemma("gemma2", 4, 2),
        "gemma3": lambda: gemma("gemma3", 7, 6, rope_parameters=gemma3_rope()),
    }[family]()
    loaded, _ = load(str(written(made, tmp_path)), base="fp32", compute_dtype="fp32")
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        expected, logits = made(ids).logits, loaded(ids).logits
    assert (logits - expected).norm() < 0.02 * expected.norm()


_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
_ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
_OTHER_MODELS = {
    "linear rope": (lambda: tiny_model("llama", rope_parameters=_LINEAR), {}, r"4\.0 for llama\.rope\.scaling\.factor"),
    "yarn": (lambda: tiny_model("llama"), _YARN, r"4\.0 for llama\.rope\.scaling\.factor"),
    "linear rope, Gemma 3": (
        lambda: gemma("gemma3", 7, 6, rope_parameters=gemma3_rope(rope_type="linear", factor=8.0)),
        {},
        r"8\.0 for gemma3\.rope\.scaling\.factor",
    ),
    "Mistral's window": (
        lambda: tiny_model("llama"), {"llama.attention.sliding_window": 64}, r"64 for llama\.attention\.sliding_window",
    ),
    "Qwen 3's heads": (lambda: tiny_model("qwen3"), {}, r"16 for qwen3\.attention\.key_length, which .* as 128"),
    "Gemma 2's cap of attention": (
        lambda: gemma("gemma2", 2, 2, attn_logit_softcapping=20.0), {}, r"20\.0 for gemma2\.attn_logit_softcapping",
    ),
    "Gemma 2's last cap": (
        lambda: gemma("gemma2", 2, 2, final_logit_softcapping=20.0), {}, r"20\.0 for gemma2\.final_logit_softcapping",
    ),
    "Gemma 2's scale": (lambda: gemma("gemma2", 2, 2, head_dim=16), {}, r"by 1/√16 \(by gemma2\..* reads as 1/√256"),
    "Gemma 2 of 27B": (lambda: gemma("gemma2", 46, 2, **_ONE_HEAD), {}, r"by 1/√64 \(by gemma2\..* reads as 1/√256"),
    "Gemma 3 of 27B": (lambda: gemma("gemma3", 62, 6, **_ONE_HEAD), {}, r"by 1/√64 \(by gemma3\..* reads as 1/√256"),
    "Gemma 3's windows": (lambda: gemma("gemma3", 6, 2), {}, r"False\] for gemma3\.attention\.sliding_window_pattern"),
    "windows by a number": (
        lambda: gemma("gemma3", 7, 6), {"gemma3.attention.sliding_window_pattern": 2}, "for .*sliding_window_pattern",
    ),
    "the windowed layers' base": (
        lambda: gemma("gemma3", 7, 6), {"gemma3.rope.freq_base_swa": 500.0}, r"500\.0 for gemma3\.rope\.freq_base_swa",
    ),
    "called mistral": (  # transformers gives it Mistral 7B's window
        lambda: tiny_model("llama"),
        {"general.name": "mistral", "llama.context_length": 8192},
        r"becomes another model in transformers: it sees 4096 tokens back",
    ),
    "an unknown key": (lambda: tiny_model("llama"), {"llama.new_scale": 2.0}, r"2\.0 for llama\.new_scale"),
    "a part of a split file": (lambda: tiny_model("llama"), {"split.count": 2}, "is one of 2 parts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", _OTHER_MODELS)
def test_what_transformers_reads_as_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    make, keys, problem = _OTHER_MODELS[kind]
    with pytest.raises(UserError, match=rf"tiny-f16\.gguf .*{problem}.*Give "):
        resolve(str(written(make(), tmp_path, keys=keys)))


def test_keys_that_say_what_is_so_without_them(tmp_path: Path) -> None:
    says = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.attention.key_length": None,
        "llama.attention.value_length": None,
        "llama.rope.dimension_count": None,
        "llama.vocab_size": None,
    }
    assert resolve(str(written(tiny_model("llama"), tmp_path / "llama", keys=says))).config.head_dim == 16
    windows = {"gemma3.attention.sliding_window_pattern": 6, "gemma3.rope.freq_base_swa": None}
    resolve(str(written(gemma("gemma3", 7, 6, rope_parameters=gemma3_rope()), tmp_path / "gemma", keys=windows)))


def test_an_architecture_whose_reading_is_not_known(tmp_path: Path) -> None:
    file = GgufFile(tmp_path / "x.gguf", "phi3", {}, {}, None, frozenset())
    with pytest.raises(UserError, match=r"x\.gguf is a phi3, .*safetensors checkpoint.*one of gemma, .*llama"):
        check_config(file, Phi3Config(), "model.name")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"attention_bias": True}, r"blk\.0\.attn_k\.bias, .* \(and 5 more\)"),
        (
            {"rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }},
            r"rope_freqs\.weight",
        ),
    ],
    ids=["biases", "Llama 3's rope"],
)  # fmt: skip
def test_tensors_that_transformers_leaves_out_are_refused(fields: dict[str, Any], names: str, tmp_path: Path) -> None:
    file = written(tiny_model("llama", **fields), tmp_path)
    problem = rf"tiny-f16\.gguf has {names}, which transformers does not read from GGUF\. .*safetensors"
    resolved = resolve(str(file))
    with pytest.raises(UserError, match=problem):
        check_stored(resolved, empty_model(resolved))
    with pytest.raises(UserError, match=problem):
        load(str(file), base="fp32", compute_dtype="fp32")
    assert not converted_folder(file).exists()


def test_missing_tensors_are_refused(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fills them with random numbers."""
    file = written(model, tmp_path, without="blk.1.")
    resolved = resolve(str(file))
    problem = r"tiny-f16\.gguf lacks blk\.1\.attn_k\.weight, .* \(and 6 more\).*Give a whole"
    with pytest.raises(UserError, match=problem):
        check_stored(resolved, empty_model(resolved))
    with pytest.raises(UserError, match=problem):
        load(str(file), base="fp32", compute_dtype="fp32")
    # What its reader does not find in a file that has it is missing too.
    monkeypatch.setattr(reading, "check_tensors", lambda *_: None)
    with pytest.raises(UserError, match=r"as transformers reads it, lacks model\.layers\.1\."):
        load(str(file), base="fp32", compute_dtype="fp32")
    assert not converted_folder(file).exists()


def test_a_file_that_is_cut_off_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    for size in (3, 1000, 100_000):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(gguf_file.read_bytes()[:size])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            resolve(str(cut))


# --- the tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        *(("llama", byte_level, name) for name in ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2")),
        *(("llama", sentencepiece_style, name) for name in ("llama", "mistral", "gemma")),
        ("gemma3", sentencepiece_style, "gemma"),
    ],
)
def test_the_tokenizer_cuts_text_as_the_original(family: str, kind: Any, name: str, tmp_path: Path) -> None:
    original = kind(name)
    fields: dict[str, Any] = {"vocab_size": len(original)}
    made = tiny_model("llama", **fields) if family == "llama" else gemma("gemma3", 7, 6, **fields)
    file = written(made, tmp_path, original)
    # The file does not say whether a text that begins with a space gets another one; llama.cpp gives it one.
    texts = [*(NOT_LEADING_WITH_SPACE if name == "mistral" else TEXTS), "In 2024 it cost 1234567 won", "x  y\n\n 국어"]
    wanted = Encoder(original)
    _, converted = load(str(file), base="fp32", compute_dtype="fp32")
    for tokenizer in (converted, read_tokenizer(resolve(str(file)))):
        got = Encoder(tokenizer)
        assert [row.tolist() for row in got.encode(texts)] == [row.tolist() for row in wanted.encode(texts)]
        assert (got.prefix, got.eos) == (wanted.prefix, wanted.eos)
        assert len(tokenizer) == len(original)
        text = "In 2024  강물이 the river"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert resolve(str(file)).name == str(converted_folder(file))


def test_another_rule_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = byte_level("smollm")
    unlike = {"llama.expert_count": 0}  # the same file may have been converted by another test
    file = written(tiny_model("llama", vocab_size=len(original)), tmp_path, original, keys=unlike)
    monkeypatch.setattr(gguf_vocabulary, "pre_tokenizer_called", lambda _: pre_tokenizer_called("gpt-2"))
    got, wanted = Encoder(read_tokenizer(resolve(str(file)))), Encoder(original)
    assert [row.tolist() for row in got.encode(TEXTS)] != [row.tolist() for row in wanted.encode(TEXTS)]


def test_special_tokens_are_the_files(model: PreTrainedModel, tmp_path: Path) -> None:
    """Not those that transformers gives a Llama: "<s>" and "</s>"."""
    file = written(model, tmp_path, special={"bos": 300, "eos": 301, "pad": 0, "unk": 302})
    tokenizer = read_tokenizer(resolve(str(file)))
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert found == (300, 301, 0, 302)
    encoder = Encoder(tokenizer)
    assert (encoder.prefix, encoder.eos) == ([300], 301)


def test_whether_texts_get_bos_where_the_file_says_nothing(tmp_path: Path) -> None:
    silent = {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.add_eos_token": None}
    for kind, name, prefix in (
        (byte_level, "llama-bpe", [1]),
        (byte_level, "gpt-2", []),
        (sentencepiece_style, "llama", [1]),
    ):
        original = kind(name)
        file = written(tiny_model("llama", vocab_size=len(original)), tmp_path / name, original, keys=silent)
        assert Encoder(read_tokenizer(resolve(str(file)))).prefix == prefix


def test_tokens_of_spaces_are_found_before_merges(tmp_path: Path) -> None:
    """Gemma's, which stand in the file as spaces and not as "▁"."""
    original = sentencepiece_style("gemma")
    words = read_gguf(written(tiny_model("llama", vocab_size=len(original)), tmp_path / "a", original), "x").tokenizer
    tokens, types = list(words["tokens"]), list(words["token_type"])
    number = 600  # a syllable, which is bytes from now on
    tokens[number], types[number] = "  ", gguf_vocabulary.USER_DEFINED
    made = tiny_model("llama", vocab_size=len(original))
    tokenizer = read_tokenizer(resolve(str(written(made, tmp_path / "b", original, tokens=tokens, types=types))))
    assert number in tokenizer("a  b")["input_ids"]
    assert tokenizer.decode(tokenizer("a  b")["input_ids"], skip_special_tokens=True) == "a  b"


def test_a_text_is_not_merged_into_a_special_token() -> None:
    tokens, kinds = ["<", "s>", "<s>", "a", "b", "ab"], [1, 1, gguf_vocabulary.CONTROL, 1, 1, 1]
    assert gguf_vocabulary._merges(tokens, [-1.0, -2.0, 0.0, -3.0, -4.0, -5.0], kinds) == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("gpt-2", {"tokenizer.ggml.pre": "tekken"}, "cuts text into words by the rule 'tekken', which is not known"),
        ("gpt-2", {"tokenizer.ggml.pre": None}, "by a rule that it does not name"),
        ("gpt-2", {"tokenizer.ggml.model": "t5"}, "a tokenizer of the kind 't5'"),
        ("gpt-2", {"tokenizer.ggml.merges": ["a nothing"]}, "cannot be read"),
        ("gpt-2", {"tokenizer.ggml.tokens": None}, "cannot be read"),
        ("llama", {"tokenizer.ggml.scores": [-1000.0] * 700}, "gives every piece of its tokenizer one score"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(
    name: str, keys: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    original = byte_level(name) if name == "gpt-2" else sentencepiece_style(name)
    file = written(tiny_model("llama", vocab_size=len(original)), tmp_path, original, keys=keys)
    with pytest.raises(UserError, match=rf"tiny-f16\.gguf .*{problem}.* Give "):
        read_tokenizer(resolve(str(file)))
