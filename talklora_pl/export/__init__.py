"""An adapter as a folder that other programs load.

=========================  ========================================================================
``adapter.safetensors``    the trained tensors, and ``talklora.json`` beside them: see
                           :mod:`talklora_pl.adapter.files`
``config.json``            the base's configuration, its name, and an ``auto_map``
``modeling_talklora.py``   what the ``auto_map`` points to; needs only talklora_pl installed
``model.safetensors.*``    an index of no weights, for programs that take the folder for a whole model: what they
                           then cannot find is named so that it says what to do
tokenizer files            the base's tokenizer
``README.md``              model card
``peft/``                  the same adapter as PEFT writes it, where it is plain LoRA in effect
=========================  ========================================================================
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from talklora_pl.adapter.files import CARD, CONFIG, write_json
from talklora_pl.adapter.io import adapter_metadata, adapter_tensors
from talklora_pl.adapter.metadata import AdapterMetadata, write_files
from talklora_pl.base.heads import HEADS
from talklora_pl.durable import beside, folder_beside, no_room, put
from talklora_pl.errors import UserError
from talklora_pl.export.auto import BASE, REVISION
from talklora_pl.export.card import Facts, card
from talklora_pl.paths import expand

MODELING = "modeling_talklora.py"
INDEX = "model.safetensors.index.json"
ADVICE = "pass trust_remote_code=True, since this folder is an adapter of talklora-pl and no whole model.safetensors"
"""What ``from_pretrained`` says is missing where it is not told to run the code of the folder."""
# entries of a base's config.json that describe how its own files are stored or how it was trained
NOT_OURS = ("auto_map", "use_cache", "quantization_config", "_name_or_path", "transformers_version")


def export_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Facts | None = None,
    **base: Any,
) -> Path:
    """Write one adapter of a model in memory. Arguments as in :func:`save_adapter` and :func:`write_folder`."""
    # without a word it is causal_lm
    with_classes = [task for task, head in HEADS.items() if head.classifies and head.suffix in type(model).__name__]
    task = {"task": with_classes[0]} if with_classes else {}
    metadata = adapter_metadata(model, name, **(task | base))
    return write_folder(folder, adapter_tensors(model, name), metadata, model.config, tokenizer, facts)  # type: ignore[arg-type]


def write_folder(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: AdapterMetadata,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Facts | None = None,
) -> Path:
    """Write the whole folder beside its place, then put it there.

    Args:
        folder: takes the place of an adapter folder that is there already.
        tensors, metadata: from :func:`~talklora_pl.adapter.io.adapter_tensors` and ``adapter_metadata``.
        config: of the base, with the classes of a trained head.
        tokenizer: of the base.
        facts: for the model card.

    Raises:
        UserError: another folder is in the place.
    """
    from talklora_pl.export.peft import write_peft

    facts = facts or Facts()
    with replaced_folder(Path(folder)) as work:
        write_json(work / "config.json", config_json(config, metadata))
        write_json(work / INDEX, {"metadata": {}, "weight_map": {"lm_head.weight": ADVICE}})
        shutil.copyfile(Path(__file__).with_name(MODELING), work / MODELING)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        peft = write_peft(work / "peft", tensors, metadata, config)
        (work / CARD).write_text(card(metadata, tensors, facts, peft), encoding="utf-8")
        write_files(work, tensors, metadata, beside=True)
    return Path(expand(folder))


def config_json(config: PretrainedConfig, metadata: AdapterMetadata) -> dict[str, Any]:
    """``config.json`` of the folder."""
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    head = HEADS[metadata.base.task or "causal_lm"]
    ours = f"{MODELING.removesuffix('.py')}.{head.exported}"
    # `transformers serve` asks that auto class first, and then takes the classes of transformers alone
    asked = [head.auto_class] if head.classifies else [head.auto_class, "AutoModelForDecision"]
    return {k: v for k, v in data.items() if k not in NOT_OURS} | {
        # no class of transformers, so that programs which look for one there take the auto class
        "architectures": [head.exported],
        "auto_map": dict.fromkeys(asked, ours),
        BASE: metadata.base.name_or_path,
        REVISION: metadata.base.revision,
    }


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of ``target``; on an error ``target`` stays as it was.

    Raises:
        UserError: in the place is something else than an adapter folder, or nothing can be written there.
    """
    target = Path(os.path.abspath(expand(target)))
    if target == Path.cwd():
        raise UserError("The current folder cannot be exchanged for a new one; name a folder in it.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} exists and is no folder; choose another place.")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise UserError(f"{target} exists and is no adapter folder; choose another place.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{target} cannot be written: {e.strerror or e}.") from e
    try:
        with folder_beside(target) as work:
            yield work
            old = beside(work)
            if target.exists():
                target.rename(old)
            try:
                put(work, target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except Exception as e:
        # tokenizers and safetensors raise errors of their own where the disk is full
        if (cause := no_room(e)) is None and not isinstance(e, OSError):
            raise
        said = cause or e
        raise UserError(
            f"{target} could not be written: {getattr(said, 'strerror', None) or said}. What was there before is "
            "untouched, and so are the checkpoints of a run: `python -m talklora_pl export CKPT --out DIR` writes the "
            "folder from one."
        ) from e
