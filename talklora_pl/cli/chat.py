"""``python -m talklora_pl chat ADAPTER``: talk to an adapter in a terminal, or through a pipe."""

from __future__ import annotations

from typing import Literal

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError


def chat(
    adapter: str,
    base: str | None = None,
    show: Literal["answer", "experts"] = "answer",
    format: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str | None = None,
    plugins: list[str] | str = (),  # type: ignore[assignment]
) -> None:
    """Talk to an adapter: a line is a question, answered word by word. /help lists the commands.

    Args:
        adapter: folder of the adapter, folder of a run, or repository on the hub.
        base: hub name, folder, .gguf file or package:NAME/FILE of its base model; by default the one it remembers.
        show: the answer alone, or every token in the colour of its strongest expert.
        format: how a question is written, as in training; by default the tokenizer's chat template, else as it is.
        system: a system text at the beginning of the conversation.
        max_new_tokens: of an answer.
        temperature: of sampling; 0 takes the likeliest token.
        dtype: of the frozen weights.
        device: where to run; by default a GPU where there is one.
        plugins: modules or .py files with components of your own that the adapter uses.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens: must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise UserError(f"--temperature: must not be below 0, got {temperature}.")

    import torch

    from talklora_pl.adapter.hub import adapter_folder
    from talklora_pl.adapter.io import load_adapter
    from talklora_pl.adapter.metadata import read_metadata
    from talklora_pl.base import BaseModel, load_base, load_config, load_tokenizer
    from talklora_pl.base.description import describe
    from talklora_pl.cli.talk import Talk
    from talklora_pl.data.formats import NAMES
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    folder = adapter_folder(adapter)
    metadata = read_metadata(folder)
    if metadata.base.task == "sequence_classification":
        raise UserError(f"{folder} is an adapter of a classifier, which says no text; see `talklora_pl predict`.")
    path = base or metadata.base.name_or_path
    if not path:
        raise UserError("--base: the adapter does not say which model it belongs to; name it.")
    model_of = BaseModel(path, dtype=dtype, resize_embeddings=True)
    own = (folder / "tokenizer_config.json").is_file()  # it may have new tokens
    tokenizer = load_tokenizer(BaseModel(str(folder)) if own else model_of)
    if format is None:
        format = "chat" if tokenizer.chat_template else "plain"
    if (format not in NAMES and "{prompt}" not in format) or (format == "chat" and not tokenizer.chat_template):
        raise UserError(
            f"--format: {format!r} is no format of this tokenizer: {', '.join(NAMES)}, or a text with {{prompt}}."
        )
    if system and format != "chat":
        raise UserError("--system: only a chat template (--format chat) has a place for it.")
    model = load_base(model_of, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    load_adapter(model, folder)
    facts = describe(load_config(model_of), tokenizer)
    talk = Talk(model.eval(), tokenizer, format, system, show == "experts", facts, max_new_tokens, temperature)
    talk.console.print(
        f"{folder} on {path}, format {format if format in NAMES else repr(format)}. /help lists the commands."
    )
    talk.run()


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    chat(**parse(verb, chat, argv, positional=True))
