"""What is released: a wheel that holds the package alone, one version, and verbs that need no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import talklora_pl
from talklora_pl.cli import VERBS

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "talklora_pl").rglob("__init__.py")}
    mapped = {
        f"talklora_pl.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in (ROOT / "callbacks").rglob("__init__.py")
    }
    assert listed == found | mapped | {"talklora_pl.configs"}


HEAVY = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "tensorboard", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel that was built from it, and ``site`` with what the wheel installs."""
    out = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, cwd=out)
    (wheel,) = out.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(out / "site"), str(wheel)]
    subprocess.run(install, check=True, cwd=out)
    return out


def installed(built: Path, code: str) -> str:
    """What code prints that finds the installed package, away from the checkout."""
    environment = {"PYTHONPATH": str(built / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"talklora_pl"}
    wanted = ("callbacks/load_balance.py", "configs/method/talklora.yaml", "py.typed")
    assert {f"talklora_pl/{name}" for name in wanted} <= set(names)
    code = (
        "import talklora_pl, talklora_pl.callbacks as c; from talklora_pl.cli.options import find_config; "
        "print(talklora_pl.__file__, c.LoadBalance.__name__, find_config('method/talklora'))"
    )
    assert installed(built, code).count(str(built / "site")) == 2


@pytest.mark.slow
def test_what_is_uploaded_is_well_formed(built: Path) -> None:
    pytest.importorskip("twine")
    files = [str(file) for pattern in ("*.whl", "*.tar.gz") for file in built.glob(pattern)]
    assert len(files) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)


@pytest.mark.slow
def test_verbs_that_need_no_torch_run_without_it(built: Path) -> None:
    verbs = [[verb, "--help"] for verb, (module, _) in VERBS.items() if module != "lightning"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))
from talklora_pl.cli import main
for argv in {[["--help"], ["--version"], ["runs", "--root", "runs"], *verbs]!r}:
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    assert not status, (argv, status)"""
    assert installed(built, code)


def test_one_version_everywhere() -> None:
    version = talklora_pl.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+) \(", changes, re.M)[0] == version
