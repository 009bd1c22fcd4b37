"""``python -m talklora_pl VERB``: a table of verbs. fit, validate, test and predict are Lightning's command line.

Exit status: 0 done, 2 a mistake in what was asked (one message, no traceback), 143 stopped by a signal after saving
what there was to save (130 by Ctrl-C), 1 anything else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from talklora_pl import cache, stopping
from talklora_pl.durable import failed_write, in_short
from talklora_pl.errors import UserError

VERBS = {
    "fit": ("lightning", "train an adapter"),
    "validate": ("lightning", "evaluate on the validation data"),
    "test": ("lightning", "evaluate on the test data, beside the base model"),
    "predict": ("lightning", "write predictions as JSON lines"),
    "allocate": ("allocate", "how many experts each layer gets, from the spectra of its weights"),
    "compare": ("compare", "methods on the same data with the same seeds, and what their differences are worth"),
    "evaluate": ("evaluate", "an adapter beside its base on the papers' benchmarks, or on those of lm-eval"),
    "chat": ("chat", "talk to an adapter in the terminal"),
    "components": ("components", "list all parts with their options"),
    "data": ("data", "data preview: rows as the model reads them; data write: rows of benchmarks to train on"),
    "export": ("export", "write the adapter folder of a checkpoint"),
    "inspect": ("inspect", "see what the experts of an adapter do"),
    "runs": ("runs", "list the runs of a folder: method, data, seed, state, scores"),
    "quickstart": ("quickstart", "train on a small generated task and show what the experts learned"),
}
"""Verb -> module of this folder, whose ``main(verb, argv)`` it is, and a line of help."""

VERIFY = "--verify"
USAGE = "python -m talklora_pl VERB"


def main(argv: list[str] | None = None, early: Sequence[int] = ()) -> int:
    """Run one verb; returns the exit status.

    Args:
        argv: verb and options; by default those of the command line.
        early: signals that a fit got before this.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if VERIFY in rest:
        rest = [option for option in rest if option != VERIFY]
        cache.in_full = True
    try:
        if verb in ("-V", "--version"):
            print(versions())
        elif verb in ("-h", "--help"):
            lines = "\n".join(f"  {name:<11}{text}" for name, (_, text) in VERBS.items())
            print(
                f"usage: {USAGE} [options]\n\n{lines}\n\nOptions of a verb: {USAGE} --help. "
                "Versions: --version. With --verify everything cached is read in full and compared with its digest."
            )
        elif verb in VERBS:
            # a signal may come at any time from here on
            stopping.requeues = "--preemption.requeue=false" not in "=".join(rest).lower()
            with in_short(), stopping.nothing_to_keep(early) if verb == "fit" else nullcontext():
                importlib.import_module(f"talklora_pl.cli.{VERBS[verb][0]}").main(verb, rest)
        else:
            from talklora_pl.registry import did_you_mean

            raise UserError(f"There is no command {verb!r}.{did_you_mean(verb, VERBS)}")
    except UserError as e:
        return _refuse(str(e))
    except Exception as e:
        said = failed_write(e)
        if said is None:
            raise
        return _refuse(said)
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def versions() -> str:
    """Of this package, and of what decides how it runs."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from talklora_pl import __version__

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} is not installed"

    others = ", ".join(map(of, ("torch", "lightning", "transformers", "datasets")))
    return f"talklora_pl {__version__} (Python {python_version()}, {others})"
