"""Stock servers load an exported folder: ``transformers serve``, asked as OpenAI clients do; ``transformers chat``."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from talklora_pl import export_adapter
from tests.data.tiny import save_model, tokenizer
from tests.export.models import train
from tests.methods.test_configs import config_of

PAGE = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
BIN = Path(sys.executable).parent


def command(start: str) -> list[str]:
    """A line of docs/deploy.md."""
    (line,) = {found for found in re.findall(r"`(transformers [^`]*)`", PAGE) if found.startswith(f"{start} ./")}
    return line.split()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and the folder in which it runs, with ADAPTER in it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("serve")
    save_model(folder / "base", initializer_range=0.2, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    train(model, replace(config_of("talklora"), alpha=None), seed=1)
    export_adapter(model, folder / "ADAPTER", tokenizer=tokenizer())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, *words = command("transformers serve")
    run = [str(BIN / name), *words, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(run, cwd=folder, stdout=log, stderr=log, env={**os.environ, "HF_HOME": str(folder)})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address, folder
    finally:
        process.terminate()
        process.wait(30)


def answer(folder: Path, question: str, tokens: int) -> str:
    """What the folder says in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder / "ADAPTER", trust_remote_code=True)
    tok = AutoTokenizer.from_pretrained(folder / "ADAPTER")
    turns = [{"role": "user", "content": question}]
    ids = tok.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=257)
    return str(tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_a_request_as_openais_clients_make_it(server: tuple[str, Path]) -> None:
    address, folder = server
    asked = {"model": "./ADAPTER", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    told = json.loads(urllib.request.urlopen(request, timeout=120).read())
    assert told["choices"][0]["message"]["content"] == answer(folder, "hi", 6)


@pytest.mark.slow
def test_the_stock_chat(server: tuple[str, Path]) -> None:
    address, folder = server
    name, *words = command("transformers chat")
    words = [address if word.startswith("http") else word for word in words]
    done = subprocess.run(
        [str(BIN / name), *words, "max_new_tokens=6", "do_sample=False"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},  # the offline mode refuses the loopback address too
        input="hi\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    readable = re.sub(r"[^\w/]", "", answer(folder, "hi", 6))
    assert readable and readable in re.sub(r"[^\w/]", "", done.stdout), done.stdout + done.stderr
