"""Checkpoints that survive a crash at any moment, and that are checked before anything rests on them.

Writing: :mod:`talklora_pl.durable`. Lightning's writer goes through ``$TMPDIR``; where that is another file system a
crash leaves a torn file.
Reading: the checksums that every checkpoint carries are verified, and no pickled object is ever executed.
"""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from talklora_pl.adapter.files import FORMAT_VERSION
from talklora_pl.durable import no_room, remove_leftovers, write_whole
from talklora_pl.errors import UserError
from talklora_pl.runs import all_runs

KEY = "talklora"
"""Entry of a checkpoint with its format version and what the run was, see ``FineTuner.describe``."""

PARTS = {"state_dict": dict, "loops": dict, "pytorch-lightning_version": str}
"""What Lightning writes into every training checkpoint, and what it is."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Write-flush-rename checkpoint files with the user's file mode; verified reading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; after a failure at any point the file that was there before is intact.

        Raises:
            UserError: the file cannot be written (disk full, no permission).
        """
        if "://" in str(path):  # an object store writes whole objects itself
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            write_whole(path, lambda part: _save(checkpoint, part))
        except (OSError, RuntimeError) as error:
            cause = no_room(error) or error
            kept = "The checkpoint of that name from before is untouched. " if path.exists() else ""
            raise UserError(
                f"The checkpoint {path} could not be written: {cause}. {kept}"
                "Make room (or pass another directory), then resume with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint at `path` on the CPU, after the checks of `read_checkpoint`; `weights_only` is always on."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint in the file `path`, its tensors on the CPU.

    Raises:
        UserError: the file is missing, torn, damaged, not ours, or of another format version.
    """
    path = Path(path)
    others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
    names = ", ".join(p.name for p in others if p != path)
    instead = f"Checkpoints beside it, newest first: {names}." if names else "There is no other beside it."
    if not path.is_file():
        raise UserError(f"There is no checkpoint file {path}. {instead}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares every record with its checksum
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of record {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch explains at length how to load objects that are not plain data; nobody should
        found = re.search(r"WeightsUnpickler error:\s*(.*?)(?:\. |\n|$)", str(error))
        reason = f"it is not plain data: {found[1]}" if found else str(error)
        raise UserError(f"The checkpoint {path} is torn, damaged or no checkpoint ({reason}). {instead}") from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if wrong := [name for name, kind in PARTS.items() if not isinstance(parts.get(name), kind)]:
        raise UserError(f"{path} is not a training checkpoint: it lacks {' and '.join(wrong)}. {instead}")
    about = checkpoint.get(KEY)
    if not isinstance(about, dict):
        raise UserError(f"{path} is a checkpoint of another program: it lacks the entry {KEY!r}. {instead}")
    if about.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {about.get('format_version')!r}, this talklora-pl reads {FORMAT_VERSION}. "
            f"Resume it with the version that wrote it, or start anew from an exported adapter. {instead}"
        )
    return checkpoint


def refuse_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], path: str | os.PathLike[str], other_data: bool = False
) -> None:
    """Raise a `UserError` that lists every entry in which the run that wrote `path` differs from this one.

    Args:
        saved: plain data of the checkpoint.
        now: the same as this run would write it.
        path: where `saved` came from, for the message.
        other_data: the entries are about the data, on which a new run can begin from the adapter.
    """
    before, after = dict(flatten(saved)), dict(flatten(now))
    lines = [
        f"  {key}: {before.get(key, 'absent')!r} in the checkpoint, {after.get(key, 'absent')!r} in this run"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if lines:
        raise UserError(
            f"The checkpoint {path} was written by a {'run on other data' if other_data else 'different run'}:\n"
            + "\n".join(lines)
            + "\nGive the settings it was made with (the config.yaml of its run has them); only a new run, "
            "without --ckpt_path, may have others."
            + (
                f" It can begin from this adapter, with a new optimiser: --model.adapter_path {path}"
                if other_data
                else ""
            )
        )


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # an opened one: into a named one torch also writes the name
        torch.save(checkpoint, file)


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def last_checkpoint(root: str | os.PathLike[str], name: str = "last") -> Path | None:
    """The newest ``last.ckpt`` (or other `name`) of the runs under `root`."""
    found = [path for run in all_runs(root) if (path := run.newest(name))]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)
