"""Push and pull. What goes over the network is huggingface_hub's; here it goes through a folder in its place."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer

from talklora_pl import AdapterConfig, UserError, export_adapter, load_adapter, push_adapter
from talklora_pl.adapter.hub import is_repository_name, local_folder
from tests.export import models


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """(base, adapter folder, logits)."""
    base = models.save_base(tmp_path / "base", "llama")
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8))
    folder = export_adapter(model, tmp_path / "adapter", tokenizer=AutoTokenizer.from_pretrained(base))
    return base, folder, models.logits(model)


def test_push_and_pull(
    exported: tuple[Path, Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder, want = exported
    hub = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok
        (hub / repo_id).mkdir(parents=True)

    def upload_folder(self: Any, repo_id: str, folder_path: Path, commit_message: str) -> str:
        shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert revision == "v1"
        copy = tmp_path / "pulled"
        for file in (hub / repo_id).rglob("*"):
            name = str(file.relative_to(hub / repo_id))
            if file.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy / name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert push_adapter(folder, "someone/talk") == "https://hub/someone/talk"
    (hub / "someone" / "talk" / "evil.py").write_text("1 / 0")
    model = models.load(base)
    load_adapter(model, "someone/talk", revision="v1")
    assert torch.equal(models.logits(model), want)
    pulled = {p.name for p in (tmp_path / "pulled").iterdir()}
    assert pulled == {p.name for p in folder.iterdir()}  # all of ours, and nothing else

    with pytest.raises(UserError, match="no adapter folder"):
        push_adapter(base, "someone/other")


def test_names_of_repositories() -> None:
    assert all(map(is_repository_name, ("gpt2", "meta-llama/Llama-3.1-8B", "a/b_c.d")))
    assert not any(
        map(is_repository_name, ("", "../x", "a/../b", "/etc", "a/b/c", "a b", "~x", "a\n", "-x", "a" * 999))
    )


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "../nothing"])
def test_a_folder_that_is_nowhere(name: str, llama: Any) -> None:
    with pytest.raises(UserError, match=f"no adapter folder '{name}'"):
        load_adapter(llama, name)


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("HF_TOKEN") and os.environ.get("TALKLORA_HUB_REPOSITORY")),
    reason="no hub: set HF_TOKEN and TALKLORA_HUB_REPOSITORY (it is created, and deleted afterwards)",
)
def test_the_real_hub(exported: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, want = exported
    repository = os.environ["TALKLORA_HUB_REPOSITORY"]
    push_adapter(folder, repository)
    try:
        model = models.load(base)
        load_adapter(model, repository)
        assert torch.equal(models.logits(model), want)
    finally:
        huggingface_hub.HfApi().delete_repo(repository)


def test_the_name_of_a_run_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no adapter folder 'mine'.* Did you mean the run runs/mine\?"):
        local_folder("mine", local_files_only=True)
