"""From what the user typed to a Trainer's arguments: strategies by name, the counts that torchrun knows, resuming."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from talklora_pl.distributed.checkpoint import KEY, DurableCheckpointIO, last_checkpoint, read_checkpoint
from talklora_pl.distributed.ddp import AdapterDDPStrategy
from talklora_pl.distributed.fsdp import AdapterFSDP2Strategy
from talklora_pl.errors import UserError
from talklora_pl.runs import Run, newest, run_of, to_go_on
from talklora_pl.stopping import slurm_job


def trainer_arguments(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What replaces or completes the options of the section ``trainer``.

    Under torchrun ``devices`` and ``num_nodes`` follow it. ``ddp`` does not send the base's constant buffers at
    every step; ``fsdp`` is ours (Lightning's own, FSDP1, by its class path). Checkpoints are written durably.
    """
    found: dict[str, Any] = {}
    strategy = trainer.get("strategy")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        for name, launched in (("devices", local), ("num_nodes", world // local)):
            if trainer.get(name) not in (None, "auto", 1, "1", launched, str(launched)):
                raise UserError(f"trainer.{name}: torchrun started {launched}, not {trainer.get(name)}; leave it out.")
            found[name] = launched
        if strategy in (None, "auto") and world > 1:
            strategy = "ddp"
    if str(strategy).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(
            f"trainer.strategy: {strategy} hands the model over in ways that adapters do not take; use ddp."
        )
    if strategy == "ddp":
        found["strategy"] = AdapterDDPStrategy()
    elif strategy == "fsdp":
        found["strategy"] = AdapterFSDP2Strategy()
    if (accumulate := trainer.get("accumulate_grad_batches", 1)) < 1:
        raise UserError(f"trainer.accumulate_grad_batches: {accumulate} is less than 1.")
    plugins = trainer.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        found["plugins"] = [*plugins, DurableCheckpointIO()]
    return found


def resume_from(
    ckpt_path: str | None,
    root: str | os.PathLike[str],
    dirpath: str | None = None,
    verb: str = "fit",
    trained: bool = False,
    run_name: str | None = None,
) -> str | None:
    """The verified checkpoint file that ``--ckpt_path`` means, or None: a fit starts anew, another verb has the base.

    Args:
        ckpt_path: a file, or ``last`` or ``best``: that of the run to go on with (a fit), or the newest (other verbs).
        root: the folder of all runs.
        dirpath: where this run keeps its checkpoints, if not in its folder under `root`.
        verb: ``fit``, or one that cannot do without what it was told to read.
        trained: the adapter has been trained before (``model.adapter_path``).
        run_name: the run that is meant.

    Raises:
        UserError: the file is missing, damaged or not ours, several runs could be meant, or the run is still going on.
            Nothing was loaded or written by then.
    """
    if ckpt_path is None and verb != "fit" and not trained:
        rank_zero_warn(f"{verb} without --ckpt_path (a file, last or best): the adapter is untrained.")
    if ckpt_path is None or "://" in str(ckpt_path):
        return ckpt_path
    if ckpt_path in ("last", "best"):
        if dirpath is not None:
            path = newest(Path(dirpath), ckpt_path)
        elif run_name is not None:
            path = Run(Path(root) / run_name).newest(ckpt_path)
        elif verb == "fit":
            found = to_go_on(root, ckpt_path, slurm_job())
            path = found.newest(ckpt_path) if found else None
        else:
            path = last_checkpoint(root, ckpt_path)
        where = dirpath or Path(root, run_name or "")
        if path is None and verb != "fit":
            raise UserError(f"--ckpt_path {ckpt_path}: there is none in {where}.")
        if path is None:
            rank_zero_info(f"--ckpt_path {ckpt_path}: there is none in {where} yet, training starts anew.")
            return None
        ckpt_path = str(path)
    if any((Path(ckpt_path) / name).is_file() for name in ("talklora.json", "adapter_config.json")):
        raise UserError(
            f"--ckpt_path: {ckpt_path} is an adapter, and only a checkpoint can be resumed. To begin a new run from it "
            f"(with a new optimiser and counters): --model.adapter_path {ckpt_path}."
        )
    if Path(ckpt_path).is_dir():
        inside = last_checkpoint(ckpt_path)
        raise UserError(f"--ckpt_path: {ckpt_path} is a folder." + (f" Do you mean {inside}?" if inside else ""))
    read_checkpoint(ckpt_path)
    return ckpt_path


def allocation_of(ckpt_path: str | None) -> dict[str, int] | None:
    """Experts by module name of the checkpoint that a run begins from: no rule need decide again. None: one must."""
    if ckpt_path is None or "://" in str(ckpt_path):
        return None
    found: dict[str, int] = read_checkpoint(ckpt_path)[KEY]["experts_per_layer"]
    return found


def classes_of(ckpt_path: str | None) -> dict[str, Any]:
    """What the data module left in the checkpoint that a run begins from; empty: nothing."""
    if ckpt_path is None or "://" in str(ckpt_path):
        return {}
    return dict(read_checkpoint(ckpt_path).get("TextData", {}))


def place_of(ckpt_path: str | None, root: Path, name: str | None, asked: str | None, fits: bool) -> Run | None:
    """The run in whose folder a command goes on; None: it gets a new one.

    Args:
        ckpt_path: what it begins from.
        root: the folder of all runs.
        name: of the run, if it was given.
        asked: what ``--ckpt_path`` was.
        fits: it trains, and so needs the run for itself.

    Raises:
        UserError: that would replace what another run has written, or the run is still going on.
    """
    run = run_of(ckpt_path, root) if ckpt_path and "://" not in ckpt_path else None
    if name is not None and (run is None or run.name != name):
        run = Run(root / name) if (root / name).exists() else None
        # one that was stopped before it had a checkpoint begins again
        if run is not None and fits and (asked != "last" or run.newest()):
            raise UserError(
                f"--run_name {name}: there is {run.folder} already. Choose another name, or go on with it by "
                "--ckpt_path last."
            )
    if run is not None and fits:
        run.refuse_live()
    return run
