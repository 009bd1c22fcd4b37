"""Making the runs of a study: each once, by however many processes, going on where an earlier one was stopped.

A study's folder: `runs/NAME/` is an ordinary run with `result.json` beside it, `claims/` the locks of processes.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError
from talklora_pl.runs import Run
from talklora_pl.study.plan import Part, RunSpec, Study

MEASURE = "talklora_pl.study.measure.Measure"


class Folder:
    """What is there of a study.

    Args:
        study: what is asked for.
        path: where it is kept.
    """

    def __init__(self, study: Study, path: Path) -> None:
        self.study, self.path = study, path

    @property
    def runs(self) -> Path:
        """`trainer.default_root_dir` of all runs."""
        return self.path / "runs"

    def result(self, spec: RunSpec) -> dict[str, Any] | None:
        """Of a run that is over, well or not.

        Raises:
            UserError: a run of that name was made with other options.
        """
        try:
            found: dict[str, Any] = json.loads(self._result(spec).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self._result(spec)} is damaged; remove it, and the run is made again.") from None
        if found.get("digest") != spec.digest:
            raise UserError(
                f"{self.runs / spec.name} was made with other options than the study asks for now. Give the method or "
                "data another name, or another --out; or remove that folder, and the run is made again."
            )
        return found

    def write(self, spec: RunSpec, **values: Any) -> None:
        """The result of a run that is over."""
        about = {"data": spec.data, "method": spec.method, "seed": spec.seed, "choice": dict(spec.choice)}
        text = json.dumps({"digest": spec.digest, **about, **values}, indent=1, ensure_ascii=False) + "\n"
        self._result(spec).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._result(spec), lambda part: part.write_text(text, encoding="utf-8"))

    def _result(self, spec: RunSpec) -> Path:
        return self.runs / spec.name / "result.json"

    @contextmanager
    def claim(self, spec: RunSpec) -> Iterator[bool]:
        """Whether the run is this process's now; a lock ends with its process, however that ends."""
        claims = self.path / "claims"
        claims.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(claims / spec.name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    # --- what there is to do

    def trials(self, data: Part, method: Part) -> list[RunSpec]:
        """The first seed with every choice of the search; without a search, one."""
        return [self.study.run(data, method, self.study.seeds[0], choice) for choice in self.study.choices]

    def best(self, data: Part, method: Part) -> RunSpec | None:
        """The trial with the best validation score; None: not all are over, or none has the score."""
        trials = self.trials(data, method)
        results = [self.result(spec) for spec in trials]
        if len(trials) == 1 or not all(results):
            return trials[0] if len(trials) == 1 else None
        scores = [((result or {}).get("selected"), spec) for result, spec in zip(results, trials)]
        scored = [(score, spec) for score, spec in scores if score is not None]
        choose = min if self.study.small else max
        return choose(scored, key=lambda pair: pair[0])[1] if scored else None

    def chosen(self, data: Part, method: Part) -> list[RunSpec]:
        """The runs that are tested and count: those of the best trial's options with every seed."""
        best = self.best(data, method)
        if best is None:
            return []
        return [best, *(self.study.run(data, method, seed, best.choice) for seed in self.study.seeds[1:])]

    def waiting(self) -> list[RunSpec]:
        """Runs that can be made (or tested) now. Empty: there are none, and none will follow."""
        out = []
        for data, method in self.study.cells():
            for spec in dict.fromkeys([*self.trials(data, method), *self.chosen(data, method)]):
                result = self.result(spec)
                if result is None or (result["status"] == "fitted" and spec in self.chosen(data, method)):
                    out.append(spec)
        return out

    def is_chosen(self, spec: RunSpec) -> bool:
        """Whether a run is to be tested."""
        return any(spec in self.chosen(*cell) for cell in self.study.cells())

    def done(self) -> tuple[int, int]:
        """How many runs are over, of how many."""
        cells = len(self.study.methods) * len(self.study.data)
        total = cells * (len(self.study.choices) + len(self.study.seeds) - 1)
        over = sum(
            self.result(spec) is not None
            for cell in self.study.cells()
            for spec in dict.fromkeys([*self.trials(*cell), *self.chosen(*cell)])
        )
        return over, total


def work(folder: Folder, make: Callable[[Folder, RunSpec], None], say: Callable[[str], None]) -> None:
    """Make runs until none is left; other processes may do the same in the same folder."""
    while waiting := folder.waiting():
        for spec in waiting:
            with folder.claim(spec) as mine:
                if not mine or spec not in folder.waiting():
                    continue
                over, total = folder.done()
                say(f"{spec.name} ({over} of {total} runs are done)")
                make(folder, spec)
                break
        else:
            time.sleep(0.5)  # the others are at work


def make_run(folder: Folder, spec: RunSpec) -> None:
    """Fit (or go on), and test the best checkpoint if the run counts. A run that fails is a result, too."""
    from talklora_pl.cli.lightning import run

    kept = Run(folder.runs / spec.name)
    argv = [*spec.argv, f"--trainer.default_root_dir={folder.runs}", f"--run_name={spec.name}"]
    argv += [f"--trainer.callbacks+={MEASURE}", "--trainer.enable_model_summary=false"]
    try:
        if not (kept.folder / "measured.json").exists():
            if kept.folder.exists() and kept.newest() is None:
                kept.refuse_live()
                shutil.rmtree(kept.folder)
            last = kept.newest()
            run("fit", argv if last is None else [*argv, f"--ckpt_path={last}"])
        folder.write(spec, status="fitted", **_fitted(folder.study, kept))
        if folder.is_chosen(spec):
            run("test", [*argv, f"--ckpt_path={kept.newest('best') or kept.newest()}"])
            scores = json.loads((kept.folder / "test_scores.json").read_text(encoding="utf-8"))["adapter"]
            folder.write(spec, status="finished", **_fitted(folder.study, kept), scores=scores)
    except Exception as e:  # Ctrl-C and signals are no failures of the run
        if not isinstance(e, UserError):
            (folder.path / f"{spec.name}.traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        folder.write(spec, status="failed", error=str(e) or type(e).__name__)
    gc.collect()  # a model is full of circles


def _fitted(study: Study, run: Run) -> dict[str, Any]:
    """What a run has measured."""
    measured = json.loads((run.folder / "measured.json").read_text(encoding="utf-8"))
    scores = [values[study.select] for values in measured["curve"] if study.select in values]
    if not scores:
        raise UserError(f"select: no validation logged {study.select}; give data.val or data.val_size.")
    seconds = sorted(measured["seconds"])
    return {
        "selected": min(scores) if study.small else max(scores),
        "parameters": measured["parameters"],
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
        "peak_bytes": measured["peak"],
        "curve": measured["curve"],
        "load": measured["load"],
    }
