"""mypy over the package as an installation has it, with ``callbacks/`` and ``configs/`` inside.

In a checkout these two lie beside ``talklora_pl/``, where mypy does not look for them. So all of it is linked together
in a temporary folder. Arguments are mypy's.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = ("callbacks", "configs")

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "talklora_pl"
    package.mkdir()
    for part in [*(ROOT / "talklora_pl").iterdir(), *(ROOT / name for name in OUTSIDE)]:
        (package / part.name).symlink_to(part)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--package", "talklora_pl", *sys.argv[1:]]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
for name in OUTSIDE:
    done.stdout = done.stdout.replace(f"talklora_pl/{name}/", f"{name}/")
print(done.stdout, end="")
sys.exit(done.returncode)
