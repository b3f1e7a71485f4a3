"""What would fail after the work is found before it, and the upload itself goes through the hub's own client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from steep.errors import RunError, UserError
from steep.export.push import check_push, push


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")


@pytest.mark.parametrize("name", ["ada", "ada/", "/x", "a/b/c", "ada/a name", "ada/--x", ""])
def test_a_name_that_the_hub_refuses(name: str, logged_in: None) -> None:
    with pytest.raises(UserError, match=r"^--push: .*Give USER/NAME"):
        check_push(name)


def test_nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no token.*hf auth login"):
        check_push("ada/mistral-7b-ko")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_push("ada/mistral-7b-ko")


class FakeApi:
    """Notes what a `huggingface_hub.HfApi` is asked.

    Args:
        files: that the model's repository holds.
        private: whether others cannot see it.
        error: of the upload.
    """

    def __init__(self, *files: str, private: bool = True, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files, self.private, self.error = files, private, error

    def create_repo(self, repo_id: str, **given: Any) -> str:
        self.asked.append(("create_repo", {"repo_id": repo_id, **given}))
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> Any:
        self.asked.append(("model_info", {"repo_id": repo_id}))
        return SimpleNamespace(private=self.private, siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def upload_folder(self, **given: Any) -> None:
        self.asked.append(("upload_folder", given))
        if self.error:
            raise self.error


@pytest.mark.parametrize("files", [(), (".gitattributes",), (".gitattributes", "README.md")])
def test_a_folder_is_uploaded_as_a_private_model(files: tuple[str, ...], tmp_path: Path) -> None:
    api, said = FakeApi(*files), []
    assert push(tmp_path, "ada/x", said.append, api) == "https://huggingface.co/ada/x"
    (_, made), (_, looked_at), (_, sent) = api.asked
    assert made == {"repo_id": "ada/x", "private": True, "exist_ok": True}
    assert looked_at == {"repo_id": "ada/x"}
    assert (sent["repo_id"], sent["folder_path"]) == ("ada/x", tmp_path)
    assert said == ["uploading to ada/x (private until you open it on its page)"]


def test_a_model_that_is_there_is_not_mixed_with_another(tmp_path: Path) -> None:
    api, said = FakeApi(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"), []
    problem = r"ada/x on the hub holds files already \(adapter_config\.json, adapter_model\.safetensors\)"
    with pytest.raises(RunError, match=rf"{problem}.*The result is in {tmp_path}: .*hf upload USER/NAME"):
        push(tmp_path, "ada/x", said.append, api)
    assert [name for name, _ in api.asked] == ["create_repo", "model_info"]
    assert said == []


def test_a_public_model_is_not_called_private(tmp_path: Path) -> None:
    said: list[str] = []
    push(tmp_path, "ada/x", said.append, FakeApi(private=False))
    assert said == ["uploading to ada/x (that was there before and is public: everybody can read it)"]


def test_a_refusal_says_where_the_result_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"refused ada/x: off\. The result is in {tmp_path}"):
        push(tmp_path, "ada/x", print, FakeApi(error=OfflineModeIsEnabled("off")))
