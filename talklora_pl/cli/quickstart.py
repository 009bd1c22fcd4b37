"""``python -m talklora_pl quickstart``: train on the generated skills, show what was learned and by which experts.

Further options go to ``fit``: ``quickstart --config method/lora``, ``quickstart --model.adapter.communication none``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

USAGE = """usage: python -m talklora_pl quickstart [options of fit]

Trains a model of 135 million parameters on small generated skills, shows what it answers before and after, and which
experts did it. The files go to ./quickstart.

  all options are those of: python -m talklora_pl fit --help"""
FOLDER = Path("quickstart")
BEGIN = """\
A model of 135 million parameters learns small skills: {skills}.
The questions are generated: {folder}/train.jsonl, {folder}/test.jsonl."""
NEXT = """
What is where
  {log}/adapters/last   the adapter: load it as in README
  {log}
      scores, answers, checkpoints, and what TensorBoard shows:
      {python} -m tensorboard.main --logdir {log}
What to type next
  {python} -m talklora_pl quickstart --config method/lora
      the same with plain LoRA
  {python} -m talklora_pl quickstart --model.adapter.communication attention
      another way for experts to talk
  {python} -m talklora_pl components
      all parts there are
  {python} -m talklora_pl fit --config method/talklora \\
      --model.base.path MODEL --data.train YOUR.jsonl"""


def main(verb: str, argv: list[str]) -> None:
    """Train, test, export and explain; the files go to ``./quickstart``."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        raise SystemExit(0)  # as the other verbs do

    from talklora_pl.quickstart import skills

    learned = skills.LEARNED_FIRST
    skills.write(FOLDER, test=16, skills=learned)
    print(BEGIN.format(skills=", ".join(learned), folder=FOLDER), file=sys.stderr)
    # bars of other libraries for what is over in a second or two
    os.environ.setdefault("TQDM_DISABLE", "1")
    import rich

    from talklora_pl.cli.lightning import run
    from talklora_pl.quickstart.report import answers_table, experts_by_task, specialist_table

    # method files do not add up
    method = [] if any("method/" in arg for arg in argv) else ["--config", "method/talklora"]
    cli = run("fit", [*method, "--config", "quickstart", *argv])
    trainer, tuner = cli.trainer, cli.model
    print("The test asks new questions, before and after the training.", file=sys.stderr)
    trainer.test(tuner, datamodule=cli.datamodule, verbose=False)
    # whatever the ranks compute together is outside of the condition
    answers = answers_table(tuner, cli.datamodule.test_dataloader())
    by_layer = experts_by_task(tuner, cli.datamodule.test_dataloader())
    log = trainer.log_dir
    if trainer.is_global_zero:
        rich.print(answers)
        if by_layer:
            rich.print(specialist_table(by_layer))
        print(NEXT.format(log=log, folder=FOLDER, python=_python()))


def _python() -> str:
    """How to type this interpreter: the environment that make has created need not be active."""
    here, program = Path.cwd(), Path(sys.executable)
    return str(program.relative_to(here)) if program.is_relative_to(here) else "python"
