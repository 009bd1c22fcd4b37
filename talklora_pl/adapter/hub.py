"""Adapter folders on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from talklora_pl.adapter.files import CONFIG
from talklora_pl.adapter.metadata import read_metadata
from talklora_pl.errors import UserError
from talklora_pl.paths import expand
from talklora_pl.runs import RUNS

# what a program needs of an adapter repository; nothing else is fetched
PATTERNS = ["*.json", "adapter.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "modeling_talklora.py"]
PATTERNS += ["adapter_model.safetensors"]  # of PEFT, to start from
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_repository_name(name: str) -> bool:
    """Whether ``name`` has the form of a hub repository (``owner/name`` or ``name``)."""
    return len(name) <= 200 and ".." not in name and REPOSITORY.fullmatch(name) is not None


def local_folder(name: str | os.PathLike[str], revision: str | None = None, **hub: Any) -> Path:
    """The folder itself, or the local copy of a hub repository.

    Args:
        hub: options of ``huggingface_hub.snapshot_download`` (token, cache_dir, local_files_only).

    Raises:
        UserError: neither a folder nor a repository that can be reached.
    """
    path = Path(expand(name))
    if path.is_dir():
        return path
    if isinstance(name, Path) or path.exists() or not is_repository_name(str(name)):
        raise UserError(f"There is no adapter folder {str(name)!r}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=PATTERNS, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        first = next(iter(str(e).splitlines()), type(e).__name__)
        run = f" Did you mean the run {RUNS}/{name}?" if Path(RUNS, path).is_dir() else ""
        raise UserError(
            f"There is no adapter folder {str(name)!r}, and as a hub repository it cannot be had: {first}{run}"
        ) from e


def adapter_folder(name: str) -> Path:
    """The folder of an adapter: itself, or of a run its best adapter, else its last, or the copy of a hub repository.

    Raises:
        UserError: see :func:`local_folder`.
    """
    folder = local_folder(name)
    places = (folder, folder / "adapters/best", folder / "adapters/last")
    return next((place for place in places if (place / CONFIG).is_file()), folder)


def push_adapter(folder: str | Path, repository: str, private: bool = True, token: str | None = None) -> str:
    """Upload an exported adapter folder; returns its address.

    Raises:
        UserError: no adapter folder, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    read_metadata(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload adapter"))
    except (HfHubHTTPError, OSError) as e:
        raise UserError(f"{repository!r} cannot be pushed: {next(iter(str(e).splitlines()), type(e).__name__)}") from e
