"""``python -m talklora_pl compare``: methods on the same data with the same seeds, and what a difference is worth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError


def compare(config: str, out: str | None = None, parallel: int = 1, report: bool = False) -> None:
    """Make all runs of a study that are not made yet, and say what came out.

    Args:
        config: the study's YAML, see docs/compare.md.
        out: its folder; by default studies/ and the name of the YAML.
        parallel: processes that make runs side by side, each with a base of its own; of several GPUs each has one.
        report: make no runs, only write what is known by now.
    """
    from talklora_pl.base.shared import shared_bases
    from talklora_pl.study.match import matched
    from talklora_pl.study.plan import read_study
    from talklora_pl.study.report import write
    from talklora_pl.study.work import Folder, make_run, work

    if parallel < 1:
        raise UserError(f"compare: --parallel {parallel} is less than 1.")
    folder = Folder(read_study(config), Path(out or Path("studies") / Path(config).stem))
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.study = matched(folder.study)
    folder.waiting()  # refuses runs of another study before any work
    if not report and parallel > 1:
        _side_by_side([f"--config={config}", f"--out={folder.path}"], parallel)
    elif not report:
        with shared_bases():
            work(folder, make_run, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{write(folder)}\nThe page: {folder.path / 'index.html'}")


def _side_by_side(options: list[str], processes: int) -> None:
    """Processes that do the same study; each takes the runs that nobody has."""
    import torch

    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "talklora_pl", "compare", *options]
    cores = max(1, (os.cpu_count() or 1) // processes)
    started = list[subprocess.Popen[bytes]]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the others are to hear of it
    try:
        for i in range(processes):
            own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
            if gpus:
                own["CUDA_VISIBLE_DEVICES"] = str(i % gpus)
            started.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL))
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.terminate()  # which saves; one that is over does not mind
    if failed := [code for code in codes if code]:
        raise UserError(f"compare: {len(failed)} of {processes} processes ended early. Start it again to go on.")


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    compare(**parse(verb, compare, argv))
