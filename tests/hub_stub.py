"""The Hugging Face Hub without a network: uploads go where the real client keeps what it has downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import timm.models._hub

COMMIT = "0" * 40


class Hub:
    """The part of ``huggingface_hub.HfApi`` that timm's ``push_to_hf_hub`` calls, on a folder as the client's cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def folder(self, repo_id: str) -> Path:
        return self.cache / f"models--{repo_id.replace('/', '--')}"

    def files(self, repo_id: str) -> Path:
        """The folder of the only commit of a repository."""
        return self.folder(repo_id) / "snapshots" / COMMIT

    def file_exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self.files(repo_id) / filename).exists()

    def upload_folder(self, repo_id: str, folder_path: str, **kwargs: Any) -> None:
        shutil.copytree(folder_path, self.files(repo_id), dirs_exist_ok=True)
        (self.folder(repo_id) / "refs").mkdir(exist_ok=True)
        (self.folder(repo_id) / "refs" / "main").write_text(COMMIT)


def put_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub of a test, for timm to push to; the client itself looks into its cache alone."""
    hub = Hub(cache)
    monkeypatch.setattr(timm.models._hub, "HfApi", lambda **kwargs: hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return hub
