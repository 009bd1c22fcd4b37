"""Talking to an adapter through a pipe."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from talklora_pl import export_adapter
from talklora_pl.adapter.io import load_adapter
from talklora_pl.cli import main
from talklora_pl.cli import talk as module
from tests.data.tiny import save_model, tokenizer
from tests.export.models import train
from tests.methods.test_configs import config_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template, and an adapter exported as a run does."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "base", initializer_range=0.2)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    train(model, replace(config_of("talklora"), alpha=None), seed=1)
    export_adapter(model, folder / "run/adapters/last", tokenizer=tokenizer())
    return folder


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *args: str) -> str:
    out = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda **options: Console(file=out, width=10_000, **options))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *args, "--dtype", "float32", "--max_new_tokens", "6"]) == 0
    return out.getvalue()


def generated(folder: Path, prompt: str, adapter: bool) -> str:
    model, tok = AutoModelForCausalLM.from_pretrained(folder / "base").eval(), tokenizer()
    if adapter:
        load_adapter(model, folder / "run/adapters/last")
    ids = tok(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=257, pad_token_id=257)
    return shown(tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def shown(text: str) -> str:
    """Without what would move the cursor of a terminal; a random model writes such characters."""
    return re.sub(r"[\x07\x08\x0b\x0c\r]", "", text)


def test_answers_are_the_models_and_the_conversation_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = talk(monkeypatch, "hi\n/base\nand?\n/new\nhi\n/nonsense\n", str(folder / "run"))
    first = "<s>[user]hi\n[assistant]"
    answer = generated(folder, first, adapter=True)
    more = generated(folder, f"{first}{answer}</s>\n[user]and?\n[assistant]", adapter=True)
    base = generated(folder, first, adapter=False)
    assert base != answer
    said = text[text.index("\n") + 1 :]
    assert said == f"{answer}\nbase: {base}\n{more}\n{answer}\nThere is no command /nonsense. /help lists them.\n"


def test_every_token_has_its_strongest_expert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer; its tokens are counted, but the last, which the model does not read."""
    adapter = str(folder / "run/adapters/last")
    plain, coloured = (talk(monkeypatch, "hi\n", adapter, *more) for more in ([], ["--show", "experts"]))
    assert coloured.startswith(plain.rstrip("\n"))
    counts = [int(n) for n in re.findall(r"\d+ (\d+) tokens?", coloured.splitlines()[-1])]
    answer = plain.split("\n", 1)[1].rstrip("\n")
    assert 0 < sum(counts) <= 5 and answer
    # by hand: the routing of each token where it is read
    from talklora_pl import RoutingCollector

    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    load_adapter(model, adapter)
    ids = tokenizer()("<s>[user]hi\n[assistant]", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=257, pad_token_id=257)
        with RoutingCollector(model) as collector:
            model(whole[:, :-1])
    weights_TE = sum(r.routing.weights_TE for r in collector.records)[ids.shape[1] :]
    wanted = weights_TE.argmax(1).bincount(minlength=4)
    found: dict[str, Any] = dict(re.findall(r"(\d+) (\d+) tokens?", coloured.splitlines()[-1]))
    if "\ufffd" not in tokenizer().decode(whole[0, ids.shape[1] :]):
        assert {int(e): int(n) for e, n in found.items()} == {e: int(n) for e, n in enumerate(wanted) if n}


def test_an_answer_of_one_token_has_no_colour_and_says_so() -> None:
    from rich.console import Console

    from talklora_pl.cli.talk import Streamer

    assert "too short" in Streamer(tokenizer(), Console()).legend().plain


def test_what_cannot_be_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(folder / "run/adapters/last")
    for args, said in (
        ([str(folder / "base")], "talklora.json"),
        ([adapter, "--max_new_tokens", "0"], "at least 1"),
        ([adapter, "--temperature", "-1"], "not be below 0"),
        ([adapter, "--format", "chatt"], "no format of this tokenizer"),
        ([adapter, "--format", "plain", "--system", "x"], "only a chat template"),
        ([adapter, "--base", str(folder / "nowhere")], "nowhere"),
    ):
        assert main(["chat", *args]) == 2
        assert said in capsys.readouterr().err
