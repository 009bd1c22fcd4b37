"""The wheel holds talklora_pl only, with callbacks and configs inside."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "talklora_pl").rglob("__init__.py")}
    mapped = {
        f"talklora_pl.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in (ROOT / "callbacks").rglob("__init__.py")
    }
    assert listed == found | mapped | {"talklora_pl.configs"}


@pytest.mark.slow
def test_wheel_installs_and_finds_configs_by_name(tmp_path: Path) -> None:
    """Built away from the checkout, installed beside this environment's packages, asked for a shipped config."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"talklora_pl"}
    assert "talklora_pl/callbacks/load_balance.py" in names
    assert "talklora_pl/configs/method/talklora.yaml" in names
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    code = (
        "import talklora_pl, talklora_pl.callbacks as c; from talklora_pl.cli.options import find_config; "
        "print(talklora_pl.__file__, c.LoadBalance.__name__, find_config('method/talklora'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, cwd=tmp_path, check=True, capture_output=True
    )
    assert out.stdout.decode().count(str(target)) == 2
