"""``python -m talklora_pl VERB``: a table of verbs. fit, validate, test and predict are Lightning's command line.

Exit status: 0 done, 2 a mistake in what was asked (one message, no traceback), 143 stopped by a signal after saving,
1 anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from talklora_pl.errors import UserError

LIGHTNING = {
    "fit": "train an adapter",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data, beside the base model",
    "predict": "write predictions as JSON lines",
}
COMMANDS = {
    "allocate": "how many experts each layer deserves, from the spectra of its weights",
    "components": "list all parts with their options",
    "export": "write the adapter folder of a checkpoint",
    "inspect": "see what the experts of an adapter do",
    "quickstart": "train on a small generated task and show what the experts learned",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else "--help"
    try:
        if verb in ("-h", "--help"):
            print(_help())
            return 0
        if verb in COMMANDS:
            return importlib.import_module(f"talklora_pl.cli.{verb}").main(argv[1:]) or 0
        if verb in LIGHTNING:
            from talklora_pl.cli.lightning import run

            run(verb, argv[1:])
            return 0
        from talklora_pl.registry import did_you_mean

        raise UserError(f"There is no command {verb!r}.{did_you_mean(verb, [*LIGHTNING, *COMMANDS])}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _help() -> str:
    verbs = LIGHTNING | COMMANDS
    lines = "\n".join(f"  {v:<11}{text}" for v, text in verbs.items())
    usage = "python -m talklora_pl VERB"
    return f"usage: {usage} [options]\n\n{lines}\n\nOptions of a verb: {usage} --help"
