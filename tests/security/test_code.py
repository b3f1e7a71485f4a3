"""Nothing that steep reads can run code. For each format a payload is planted; it is shown to work, that the file was
on the way, and that it did not run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import config as datasets_config
from transformers import AutoModelForCausalLM

from steep import cli
from steep.config import load_config
from steep.data.readers import read_documents
from steep.data.sources import Source
from steep.errors import UserError
from steep.export.gguf import write_gguf
from steep.hand_over import export_run
from steep.model.load import load
from steep.model.resolve import read_tokenizer, read_tokenizer_folder, resolve
from steep.plan import plan_run
from steep.report.page import write_report
from steep.result import evaluate_run, generate_run
from steep.run import train_run
from steep.training.state_files import load_state
from tests.security.payloads import Payload
from tests.syntax import called_name, sources
from tests.test_run import lines, run_file
from tests.training.helpers import adapted


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path)


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether to run code, where it is not told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked whether to run code"))


@pytest.fixture
def base(llama_folder: Path, tmp_path: Path) -> Path:
    """A base model of the test's own."""
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


@pytest.fixture(scope="module")
def trained(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ko"
    train_run(run_file(llama_folder, korean_corpus, folder, training={"max_steps": 3, "save_steps": 2}))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "ko"))


def change_json(file: Path, **values: Any) -> None:
    tree = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(tree | values), encoding="utf-8")


# ---- the base model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_in_pickle_is_refused_before_it_is_read(
    sharded: bool, base: Path, payload: Payload, korean_corpus: Path, tmp_path: Path
) -> None:
    (base / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    payload.torch_file(base / name)
    if sharded:
        change_json(base / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": name})
    with pytest.raises(UserError, match=r"has no weights in safetensors .*Convert it once"):
        plan_run(run_file(base, korean_corpus, tmp_path / "run"))
    assert not payload.ran


def test_a_pickle_beside_the_weights_is_not_read(base: Path, payload: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        payload.torch_file(base / name)
    for name in ("tokenizer.pkl", "vocab.pkl", "merges.pkl", "model.pkl"):
        (base / name).write_bytes(payload.pickled)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    model, tokenizer = load(str(base), base="fp32", compute_dtype="fp32")
    assert model.lm_head.weight.isfinite().all() and len(tokenizer) == 384
    assert not payload.ran


def test_code_that_comes_with_the_checkpoint_needs_to_be_trusted(base: Path, payload: Payload) -> None:
    payload.module(base / "modeling_planted.py", "PlantedConfig", "PlantedModel")
    code = {"AutoConfig": "modeling_planted.PlantedConfig", "AutoModelForCausalLM": "modeling_planted.PlantedModel"}
    change_json(base / "config.json", model_type="planted", auto_map=code)
    with pytest.raises(UserError, match=r"needs code that comes with the checkpoint\. If you trust that code, set"):
        resolve(str(base))
    assert not payload.ran
    with pytest.raises(
        UserError, match="register_for_auto_class"
    ):  # the planted class is no config, but it was imported
        resolve(str(base), trust_remote_code=True)
    assert payload.works()


def test_where_transformers_knows_the_model_its_own_code_is_taken(base: Path, payload: Payload) -> None:
    payload.module(base / "modeling_planted.py", "PlantedConfig", "PlantedModel")
    payload.module(base / "custom_generate" / "generate.py", "generate")
    code = {"AutoConfig": "modeling_planted.PlantedConfig", "AutoModelForCausalLM": "modeling_planted.PlantedModel"}
    change_json(base / "config.json", auto_map=code)
    change_json(base / "generation_config.json", custom_generate="./custom_generate")
    model, _ = load(str(base), base="fp32", compute_dtype="fp32")
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not payload.ran


def test_a_tokenizer_of_its_own_is_not_run(base: Path, payload: Payload, run: Path) -> None:
    for folder in (base, run / "final"):
        payload.module(folder / "tokenization_planted.py", "PlantedTokenizer")
        code = {"AutoTokenizer": [None, "tokenization_planted.PlantedTokenizer"]}
        change_json(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="PlantedTokenizer")
    change_json(base / "config.json", model_type="llama")
    # A class that transformers does not know is passed over for the one of the model's type, or refused.
    for read in (lambda: read_tokenizer(resolve(str(base))), lambda: read_tokenizer_folder(run / "final")):
        try:
            read()
        except UserError as error:
            assert "needs code that comes with the checkpoint" in str(error)
    assert not payload.ran


def test_a_kernel_of_the_hub_is_refused(base: Path) -> None:
    """With the package `kernels`, transformers would download and load it."""
    change_json(base / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(ImportError, match="kernels"):
        AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match=r"asks for the attention kernel somebody/attention, which is code"):
        resolve(str(base))


@pytest.fixture
def megatron(payload: Payload, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of an adapter that make PEFT import a planted module."""
    folder = payload.mark.parent / "modules"
    payload.module(folder / "megatron" / "core.py")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("megatron", "megatron.core"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "megatron.core"}


def test_an_adapter_in_the_base_is_refused(base: Path, payload: Payload, megatron: dict[str, Any]) -> None:
    adapted().save_pretrained(str(base), save_embedding_layers=False)
    change_json(base / "adapter_config.json", **megatron)
    with pytest.raises(AttributeError, match="tensor_parallel"):
        AutoModelForCausalLM.from_pretrained(base)
    assert payload.works()
    for name in ("megatron", "megatron.core"):
        sys.modules.pop(name)
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\)"):
        load(str(base))
    assert not payload.ran


@pytest.mark.parametrize("command", [evaluate_run, lambda run: generate_run(run, "the river")])
def test_a_module_that_an_adapter_names_is_not_imported(
    command: Callable[[Path], Any], run: Path, payload: Payload, megatron: dict[str, Any]
) -> None:
    change_json(run / "final" / "adapter_config.json", **megatron)
    with pytest.raises(UserError, match=r"adapter_config\.json has megatron_config"):
        command(run)
    with pytest.raises(UserError, match=r"adapter_config\.json has megatron_config"):
        export_run(run, run.parent / "out", to="adapter")
    assert not payload.ran


def test_the_class_that_an_adapter_names_is_not_imported(run: Path, payload: Payload) -> None:
    payload.module(run.parent / "planted_library.py", "Planted")
    change_json(
        run / "final" / "adapter_config.json",
        auto_mapping={"base_model_class": "Planted", "parent_library": "planted_library"},
    )
    assert generate_run(run, "the river", max_new_tokens=2)["trained"] is not None
    assert not payload.ran and "planted_library" not in sys.modules


def test_chat_templates_are_never_rendered(base: Path, payload: Payload, korean_corpus: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text(payload.template, encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "more.jinja").write_text(payload.template, encoding="utf-8")
    folder = tmp_path / "run"
    train_run(run_file(base, korean_corpus, folder, training={"max_steps": 1, "warmup_steps": 0}))
    assert payload.template in (folder / "final" / "chat_template.jinja").read_text(encoding="utf-8")
    evaluate_run(folder)
    generate_run(folder, "the river", max_new_tokens=2)
    export_run(folder, tmp_path / "merged")
    assert not payload.ran


def test_a_gguf_file_and_what_lies_beside_it(base: Path, payload: Payload, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text(payload.template, encoding="utf-8")
    (file,) = [file for file in write_gguf(base, tmp_path, "tiny") if file.name.endswith("f16.gguf")]
    payload.module(tmp_path / "tokenization_planted.py", "PlantedTokenizer")
    code = {"AutoTokenizer": [None, "tokenization_planted.PlantedTokenizer"]}
    change_json(tmp_path / "tokenizer_config.json", auto_map=code)
    payload.torch_file(tmp_path / "pytorch_model.bin")
    try:
        load(str(file), base="fp32", compute_dtype="fp32")
    except UserError as error:
        assert "needs code that comes with the checkpoint" in str(error)
    assert not payload.ran
    (tmp_path / "tokenizer_config.json").unlink()
    _, tokenizer = load(str(file), base="fp32", compute_dtype="fp32")
    assert len(tokenizer) >= 384 and not payload.ran


def test_every_model_and_tokenizer_is_read_without_trusting_code() -> None:
    """transformers asks on the terminal where it is told neither yes nor no; so each call says it, or hands on the
    arguments of a resolved model, which do."""
    told = []
    for module, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or called_name(node) not in ("from_pretrained", "from_config"):
                continue
            owner = ast.unparse(node.func).split(".")[0]
            if owner.startswith("Auto") or owner == "loader":
                given = [keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords]
                assert {"trust_remote_code", "arguments"} & set(given) or module == "steep.model.text_model", (
                    f"{module}:{node.lineno}"
                )
                told.append(module)
    assert len(told) > 5


# ---- a run's checkpoints


def test_what_is_planted_into_a_checkpoint_is_not_read(
    run: Path, payload: Payload, llama_folder: Path, korean_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-3")
    for name in (
        "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth",
        "rng_state_0.pth", "pytorch_model.bin", "adapter_model.bin", "custom_checkpoint_0.pkl",
    ):  # fmt: skip
        payload.torch_file(run / "checkpoint-2" / name)
    (run / "checkpoint-2" / "tokenizer.pkl").write_bytes(payload.pickled)
    payload.module(run / "checkpoint-2" / "tokenization_planted.py", "PlantedTokenizer")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("pickle.load was called"))
    config = run_file(llama_folder, korean_corpus, run, training={"max_steps": 3, "save_steps": 2})
    train_run(config, resume=True)
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [1, 2, 3] and (run / "final").is_dir()
    assert not payload.ran


@pytest.mark.parametrize(
    "tree",
    [
        '{"dtype": "load"}',
        '{"dtype": "nothing"}',
        '{"dtype": ["float32"]}',
        '{"tensor": "7"}',
        '{"subclass": "Popen", "parts": {"dict": []}, "context": {"list": []}}',
        '{"dict": [[{"list": []}, 1]]}',
        '{"unknown": 1}',
        '{"list": ' * 5_000 + "1" + "}" * 5_000,
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_state_names_nothing_but_tensors_and_dtypes(tree: str, tmp_path: Path) -> None:
    from tests.training.helpers import save_state

    save_state({"dtype": torch.float32}, tmp_path, "x")
    assert load_state(tmp_path, "x") == {"dtype": torch.float32}
    (tmp_path / "x.json").write_bytes(tree.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"is damaged: x cannot be read"):
        load_state(tmp_path, "x")


# ---- run files, and run folders of others


def test_a_tag_in_a_run_file_is_refused(
    payload: Payload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ko.yaml"
    file.write_text(f"model:\n  name: {payload.tag}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is not valid YAML in line 2, column 9: could not determine a constructor"):
        load_config(file)
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(file, ["--model.name", payload.tag])
    monkeypatch.setattr(sys, "argv", ["steep", "plan", str(file)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "python/object" in capsys.readouterr().err
    assert not payload.ran


@pytest.mark.parametrize(
    "command",
    [
        evaluate_run,
        lambda run: generate_run(run, "the river"),
        lambda run: export_run(run, run.parent / "out"),
        lambda run: write_report([run]),
        lambda run: train_run(load_config(run.parent / "ko.yaml", ["--training.output_dir", str(run)]), resume=True),
    ],
)
def test_a_tag_in_a_run_folder_is_refused(command: Callable[[Path], Any], run: Path, payload: Payload) -> None:
    given = (run / "run.yaml").read_text(encoding="utf-8")
    (run.parent / "ko.yaml").write_text(given, encoding="utf-8")
    (run / "run.yaml").write_text(f"{given}more: {payload.tag}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml is damaged: could not determine a constructor"):
        command(run)
    assert not payload.ran


@pytest.mark.parametrize(
    "command",
    [
        evaluate_run,
        lambda run, **given: generate_run(run, "the river", max_new_tokens=1, **given),
        lambda run, **given: export_run(run, run.parent / "out", to="adapter", **given),
    ],
)
def test_a_run_folder_does_not_decide_that_code_is_run(
    command: Callable[..., Any], run: Path, base: Path, payload: Payload
) -> None:
    payload.module(base / "modeling_planted.py", "PlantedConfig")
    change_json(base / "config.json", auto_map={"AutoConfig": "modeling_planted.PlantedConfig"}, model_type="planted")
    text = (run / "run.yaml").read_text(encoding="utf-8")
    text = text.replace("trust_remote_code: false", "trust_remote_code: true")
    name = next(line for line in text.splitlines() if line.startswith("  name: "))
    (run / "run.yaml").write_text(text.replace(name, f"  name: {base}"), encoding="utf-8")
    with pytest.raises(UserError, match=r"asks to run Python code .*add --trust-remote-code"):
        command(run)
    assert not payload.ran
    with pytest.raises(UserError, match="register_for_auto_class"):
        command(run, trust_remote_code=True)
    assert payload.ran  # asked for by the user, it runs: the folder was really on the way


# ---- text


def test_a_parquet_file_with_a_pickled_type(payload: Payload, tmp_path: Path) -> None:
    """pyarrow unpickled such types by itself before 14.0.1."""
    planted = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload.pickled}
    schema = pa.schema([pa.field("text", pa.string(), metadata=planted)])
    pq.write_table(pa.table({"text": ["one", "two"]}).cast(schema), tmp_path / "x.parquet")
    assert payload.pickled in pq.ParquetFile(tmp_path / "x.parquet").schema_arrow.field("text").metadata.values()
    assert list(read_documents(Source(path=str(tmp_path / "x.parquet")), "data.sources[0]")) == ["one", "two"]
    assert not payload.ran


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `hub:` names, beside the cache of `datasets`."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def test_the_script_of_a_data_set_is_not_run(data_set: Path, payload: Payload) -> None:
    payload.module(data_set / "set.py")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        list(read_documents(Source(hub=str(data_set)), "data.sources[0]"))
    (data_set / "set.py").rename(data_set / "loader.py")
    (data_set / "train.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    assert list(read_documents(Source(hub=str(data_set)), "data.sources[0]")) == ["one"]
    assert not payload.ran


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.pt", "train.npy"])
def test_a_pickle_is_no_data_set(name: str, data_set: Path, payload: Payload) -> None:
    (data_set / name).write_bytes(payload.pickled)
    (data_set / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        list(read_documents(Source(hub=str(data_set)), "data.sources[0]"))
    (data_set / name).rename(data_set.parent / name)
    with pytest.raises(UserError):
        list(read_documents(Source(path=str(data_set.parent / name)), "data.sources[0]"))
    assert not payload.ran


def test_a_tag_in_the_card_of_a_data_set(data_set: Path, payload: Payload) -> None:
    (data_set / "train.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    (data_set / "README.md").write_text(f"---\nlicense: {payload.tag}\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        list(read_documents(Source(hub=str(data_set)), "data.sources[0]"))
    assert not payload.ran


def test_a_tag_in_the_card_of_a_base_model(base: Path, payload: Payload, korean_corpus: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text(f"---\nlicense: {payload.tag}\n---\n\n# A base\n", encoding="utf-8")
    folder = tmp_path / "run"
    train_run(run_file(base, korean_corpus, folder, training={"max_steps": 1, "warmup_steps": 0}))
    with pytest.raises(UserError, match=r"README\.md cannot be read: could not determine a constructor"):
        export_run(folder, tmp_path / "out", to="adapter")
    assert not payload.ran
