"""The example notebook runs in a kernel, with a small model in place of the named one; what it shows was run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import save_model

FILE = Path(__file__).parents[1] / "examples" / "train.ipynb"


def printed(cell: Any) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    here = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(FILE, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)  # it comes executed
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    shown = printed(code[-1])
    base = save_model(tmp_path / "model").path
    code[0].source = code[0].source.replace(code[0].source.split('BASE = "')[1].split('"')[0], base)
    code[0].source = code[0].source.replace("STEPS = 20", "STEPS = 4")
    for cell in code:
        cell.source = cell.source.replace('"val_check_interval": 10', '"val_check_interval": 2')
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(code[-1]) == shown and "trainer.max_stps" in shown
    assert (tmp_path / "sums-adapter" / "talklora.json").is_file()


@pytest.mark.slow
def test_a_mistake_in_a_cell_is_its_message(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    code = (
        "from talklora_pl.errors import UserError\n"
        "try: 1 / 0\nexcept Exception as e: raise UserError('data.train: wrong') from e"
    )
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--quick", "--colors=nocolor", "-c", code],
        env=os.environ | {"PYTHONPATH": str(FILE.parents[1]), "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "UserError: data.train: wrong" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "1 / 0" not in done.stdout + done.stderr
