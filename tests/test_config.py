from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from steep.config import load_config, parse_config, parse_overrides
from steep.errors import UserError
from steep.initialise import init_run

MINIMAL = """
model: {name: some/model}
data: {sources: [{path: a.txt}, {path: b.txt, role: replay}]}
training: {output_dir: runs/x}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def tree(**sections: Any) -> dict[str, Any]:
    minimal = yaml.safe_load(MINIMAL)
    return {name: {**minimal.get(name, {}), **sections.get(name, {})} for name in {**minimal, **sections}}


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.use_rslora) == (256, 32, True)
    assert config.adapter.modules_to_save == ["embed_tokens", "lm_head"]
    assert (config.training.learning_rate, config.training.embedding_learning_rate) == (5e-5, None)
    assert [source.role for source in config.data.sources] == ["train", "replay"]


def test_yaml_round_trip(file: Path) -> None:
    config = load_config(file, ["--training.adam_beta2", "0.95", "--evaluation.prompts", "[안녕]"])
    text = config.to_yaml()
    assert "안녕" in text
    again = parse_config(yaml.safe_load(text))
    assert again == config
    assert again.training.further == {"adam_beta2": 0.95}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"lora_alhpa": 3}}, r"adapter\.lora_alhpa: it is not a field .* Did you mean 'lora_alpha'\?"),
        ({"modle": {}}, r"modle: it is not a field of the run file\. Did you mean 'model'\?"),
        ({"training": {"learning_rat": 1e-3}}, r"training\.learning_rat: .*Did you mean 'learning_rate'\?"),
        ({"training": {"fp16": True}}, r"training\.fp16: steep cannot honour it: precision is one choice"),
        ({"data": {"sources": [{"path": "a", "rol": "train"}]}}, r"data\.sources\[0\]\.rol: .*Did you mean 'role'\?"),
        ({"adapter": {"r": "big"}}, r"adapter\.r: 'big' is not valid"),
        ({"adapter": {"r": 0}}, r"adapter\.r: 0 is not valid.*Give a number above 0"),
        ({"adapter": {"r": True}}, r"adapter\.r: True is not valid\. Give a whole number"),
        ({"adapter": {"lora_alpha": True}}, r"adapter\.lora_alpha: True is not valid\. True and false are no numbers"),
        ({"adapter": {"lora_alpha": float("inf")}}, r"adapter\.lora_alpha: inf is not valid.*Give a finite number"),
        ({"adapter": {"target_modules": "q_proj"}}, r"adapter\.target_modules: 'q_proj' is not valid.*\[q_proj\]"),
        ({"adapter": {"target_modules": []}}, r"adapter\.target_modules: \[\] is not valid"),
        ({"adapter": {"modules_to_save": ["norm"]}}, r"adapter\.modules_to_save\[0\]: 'norm' .*embed_tokens"),
        ({"training": {"max_steps": 0}}, r"training\.max_steps: 0 is not valid\. A run without a step"),
        ({"training": {"learning_rate": 0}}, r"training\.learning_rate: 0 is not valid.*above 0"),
        ({"training": {"num_train_epochs": float("inf")}}, r"training\.num_train_epochs: inf is not valid"),
        ({"training": {"use_cpu": True}}, r"training\.use_cpu: steep cannot honour it"),
        ({"training": {"save_strategy": "best"}}, r"training\.save_strategy: steep cannot honour best"),
        ({"adapter": {"r": -4}}, r"adapter\.r: -4 is not valid"),
        ({"adapter": {"r": 1.5}}, r"adapter\.r: 1\.5 is not valid"),
        ({"model": {"base": "nf8"}}, r"model\.base: 'nf8' is not valid\. Give one of .*nf4"),
        ({"data": {"sources": []}}, r"data\.sources: \[\] is not valid"),
        ({"data": {"holdout": 1}}, r"data\.holdout: 1 is not valid"),
        ({"training": {"learning_rate": float("nan")}}, r"training\.learning_rate: nan is not valid"),
        ({"training": {"learning_rate": -1e-4}}, r"training\.learning_rate: -0\.0001 is not valid"),
        (
            {"training": {"embedding_learning_rate": 1e-5}, "adapter": {"modules_to_save": []}},
            r"training\.embedding_learning_rate: it is set but no embedding is trained",
        ),
        (
            {"model": {"name": "x", "trained_dtype": "bf16", "compute_dtype": "fp32"}},
            r"model\.trained_dtype: bf16 cannot be trained with compute_dtype fp32",
        ),
    ],
)
def test_mistakes_are_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree(**sections))


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_missing_sections_and_fields(section: str) -> None:
    whole = tree()
    del whole[section]
    with pytest.raises(UserError, match=rf"^{section}: it is missing"):
        parse_config(whole)
    with pytest.raises(UserError, match=rf"^{section}x: .*Did you mean '{section}'\?.*1 more problem"):
        parse_config({**whole, f"{section}x": {}})
    with pytest.raises(UserError, match=r"training\.output_dir: it is missing"):
        parse_config({**tree(), "training": {}})


def test_further_problems_are_counted() -> None:
    with pytest.raises(UserError, match=r"1 more problem"):
        parse_config(tree(adapter={"r": 0, "lora_alpha": 0}))


@pytest.mark.parametrize("value", ["1e-4", "0.0001", "1E-4"])
def test_numbers_that_yaml_reads_as_text(value: str, file: Path) -> None:
    file.write_text(
        MINIMAL.replace("runs/x", f"runs/x, learning_rate: {value}, adam_epsilon: {value}"), encoding="utf-8"
    )
    config = load_config(file)
    assert config.training.learning_rate == 1e-4
    assert config.training.further["adam_epsilon"] == 1e-4


def test_overrides(file: Path) -> None:
    words = [
        "--training.learning_rate", "3e-5", "--adapter.r=16", "--data.sources.1.path", "c.txt",
        "--adapter.target_modules", "[q_proj, v_proj]", "--adapter.use_rslora", "false",
        "--training.embedding_learning_rate", "null", "--evaluation.stride", "7",
    ]  # fmt: skip
    config = load_config(file, words)
    assert config.training.learning_rate == 3e-5
    assert config.adapter.r == 16
    assert [source.path for source in config.data.sources] == [str(Path.cwd() / "a.txt"), str(Path.cwd() / "c.txt")]
    assert [source.role for source in config.data.sources] == ["train", "replay"]
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.adapter.use_rslora is False
    assert config.evaluation.stride == 7


def test_a_source_can_be_added(file: Path) -> None:
    assert len(load_config(file, ["--data.sources.2.path", "c.txt"]).data.sources) == 3


@pytest.mark.parametrize("words", [["--resum"], ["x"], ["--adapter.r"], ["--r", "3"]])
def test_words_that_are_no_override(words: list[str]) -> None:
    with pytest.raises(UserError):
        parse_overrides(words)


@pytest.mark.parametrize(
    "words", [["--adapter.r.x", "3"], ["--adapter", "3"], ["--adapter.r=3", "--adapter.r.x=4"], ["--adapter.r", "[1"]]
)
def test_overrides_that_fit_nowhere(words: list[str], file: Path) -> None:
    with pytest.raises(UserError):
        load_config(file, words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b"a: [1", "is not valid YAML"),
        (
            b"model: {name: a}\nmodel: {name: b}\n",
            "is not valid YAML in line 2, column 1: 'model' stands twice in a section",
        ),
        (b"", "holds no sections"),
        (b"- 1", "holds no sections"),
        (b"model:\n", "model: "),
    ],
)
def test_unreadable_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_a_run_folder_in_place_of_its_file(file: Path) -> None:
    with pytest.raises(UserError, match=rf"is no file\. The file of that run is {file}"):
        load_config(file.parent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.name", ""], r"model\.name: '' is not valid\. Give a text"),
        (
            ["--model.new_tokens", "auto"],
            r"model\.new_tokens: 'auto' is not valid\. Say how many: .*new_tokens\.auto 2000",
        ),
    ],
)
def test_values_that_say_too_little(words: list[str], message: str, file: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(file, words)
    assert load_config(file, ["--model.new_tokens.auto", "2000"]).model.model_dump()["new_tokens"] == {"auto": 2000}


def test_init_looks_for_a_model_that_can_only_be_a_path(file: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "models/none.gguf", "./none"):
        with pytest.raises(UserError, match=f"--model: there is no {name}"):
            init_run(name, [str(file)], tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


def test_a_bare_no_is_a_strategy(file: Path) -> None:
    assert load_config(file, ["--training.save_strategy", "no"]).training.further == {"save_strategy": "no"}


@pytest.mark.parametrize("index", ["7", "foo", "-1"])
def test_a_source_that_is_not_there(index: str, file: Path) -> None:
    with pytest.raises(UserError, match=rf"sources\.{index}: there are 2 of them"):
        load_config(file, [f"--data.sources.{index}.path", "c.txt"])
    assert len(load_config(file, ["--data.sources.2.path", "c.txt"]).data.sources) == 3


def test_a_tilde_is_the_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    words = ["--model.name", "~/m", "--training.output_dir", "~/runs", "--data.sources.0.path", "~/a.txt"]
    config = load_config(file, words)
    assert config.model.name == str(tmp_path / "m")
    assert config.training.output_dir == str(tmp_path / "runs")
    assert config.data.sources[0].path == str(tmp_path / "a.txt")


def test_names_that_yaml_reads_as_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "no"):
        Path(name).touch()
    path = init_run("123", ["2024", "no"], tmp_path / "run.yaml")
    assert [Path(source.path or "").name for source in load_config(path).data.sources] == ["2024", "no"]
