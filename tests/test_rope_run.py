"""A run with a scaling of positions from its file to what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from steep.errors import UserError
from steep.hand_over import export_run
from steep.model.resolve import read_tokenizer, resolve
from steep.plan import plan_run
from steep.result import evaluate_run, load_result
from steep.run import train_run
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from tests.test_run import lines, run_file
from tests.tiny import save_tiny

YARN = {"rope_type": "yarn", "factor": 4.0}


def config_of(model: Path, corpus: Path, folder: Path, scaling: dict[str, Any] | None, **data: Any) -> RunConfig:
    given = {"base": "fp32", "fused": "on", "rope_scaling": scaling}
    return run_file(model, corpus, folder, model=given, data=data, evaluation={"prompts": []})


@pytest.fixture(scope="module")
def finished(llama_folder: Path, korean_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_of(llama_folder, korean_corpus, tmp_path_factory.mktemp("rope") / "run", YARN)
    train_run(config)
    return config


def result_of(config: RunConfig) -> Any:
    resolved = resolve(config.model.name, rope_scaling=config.model.rope_scaling)
    return load_result(config, resolved, read_tokenizer(resolved), RunFolder(config.training.output_dir)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits.float()


def test_longer_rows_are_planned_with_it_alone(llama_folder: Path, korean_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: 1024 tokens are beyond the 512 .*model\.rope_scaling"):
        plan_run(config_of(llama_folder, korean_corpus, tmp_path / "run", None, max_length=1024))
    plan = plan_run(config_of(llama_folder, korean_corpus, tmp_path / "run", YARN, max_length=1024))
    assert plan.corpus.statistics["max_length"] == 1024 and any(
        "--to gguf will refuse" in each for each in plan.warnings
    )
    assert not any("is not needed" in each for each in plan.warnings)
    for length, needed in ((512, False), (513, True)):
        plan = plan_run(config_of(llama_folder, korean_corpus, tmp_path / "run", YARN, max_length=length))
        assert any("model.rope_scaling is not needed" in each for each in plan.warnings) is not needed
    with pytest.raises(UserError, match=r"data\.max_length: 4096 .* beyond the 2048"):
        plan_run(config_of(llama_folder, korean_corpus, tmp_path / "run", YARN, max_length=4096))
    with pytest.raises(UserError, match=r"model\.rope_scaling: rope_type is 'ntk'"):
        plan_run(config_of(llama_folder, korean_corpus, tmp_path / "run", {"rope_type": "ntk", "factor": 2.0}))


def test_the_result_computes_with_it(finished: RunConfig) -> None:
    trained = result_of(finished)
    assert trained.config.rope_parameters["rope_type"] == "yarn"
    _, after = evaluate_run(finished.training.output_dir)
    rows = lines(Path(finished.training.output_dir) / "evaluation.jsonl")
    assert [score.loss for score in after] == pytest.approx([row["loss"] for row in rows if row["step"] == 6], rel=1e-5)
    readme = (Path(finished.training.output_dir) / "final" / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    ways = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    for way in ways[1:]:
        exec(way, names)
        assert torch.allclose(logits(names["model"].eval()), logits(trained), atol=1e-4), way
    assert len(ways) == 3
    unscaled = result_of(
        finished.model_copy(update={"model": finished.model.model_copy(update={"rope_scaling": None})})
    )
    assert not torch.allclose(logits(unscaled), logits(trained), atol=1e-2)  # which is what the lines are for


def test_it_stays(finished: RunConfig) -> None:
    for scaling in (None, {**YARN, "factor": 2.0}):
        other = finished.model_copy(update={"model": finished.model.model_copy(update={"rope_scaling": scaling})})
        with pytest.raises(UserError, match=r"model\.rope_scaling cannot change within a run"):
            train_run(other, resume=True)


def test_it_goes_along(finished: RunConfig, tmp_path: Path) -> None:
    export_run(finished.training.output_dir, tmp_path / "merged")  # which scores what it wrote
    written = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert written["rope_parameters"]["factor"] == 4.0 and written["max_position_embeddings"] == 2048
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert opened.config.rope_parameters == result_of(finished).config.rope_parameters
    export_run(finished.training.output_dir, tmp_path / "adapter", to="adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "rope_parameters={'rope_theta': " in card and "max_position_embeddings=2048" in card


def test_gemma_3_has_it_in_one_of_its_ropes(korean_corpus: Path, tmp_path: Path) -> None:
    """From the run to the files that others read."""
    linear = {"rope_type": "linear", "factor": 8.0}
    config = config_of(save_tiny("gemma3", tmp_path / "base"), korean_corpus, tmp_path / "run", linear)
    train_run(config)
    assert "linear" in (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    export_run(config.training.output_dir, tmp_path / "merged")  # which scores what it wrote
    written = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert written["rope_scaling"]["factor"] == 8.0 and written["rope_theta"] == written["rope_scaling"]["rope_theta"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    parameters = result_of(config).config.rope_parameters
    assert opened.config.rope_parameters == parameters and parameters["sliding_attention"]["rope_type"] == "default"
