"""``python -m talklora_pl quickstart``: train on the generated skills, show what was learned and by which experts.

Further options go to ``fit``: ``quickstart --config method/lora``, ``quickstart --model.adapter.communication none``.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path("quickstart")
NEXT = """\
What is where
  {log}/adapters/last   the adapter: AutoModelForCausalLM.from_pretrained loads it, README has the five lines
  {log}   checkpoints, scores and TensorBoard logs: {python} -m tensorboard.main --logdir {log}
  {folder}/train.jsonl   what it was trained on
What to type next
  {python} -m talklora_pl quickstart --config method/lora                       the same with plain LoRA
  {python} -m talklora_pl quickstart --model.adapter.communication attention    another way for experts to talk
  {python} -m talklora_pl components                                            all parts there are
  {python} -m talklora_pl fit --config method/talklora --model.base.path MODEL --data.train YOUR.jsonl"""


def main(verb: str, argv: list[str]) -> None:
    """Train, test, export and explain; the files go to ``./quickstart``."""
    from talklora_pl.quickstart import skills

    if not {"-h", "--help"} & set(argv):
        skills.write(FOLDER)
        print(f"{len(skills.SKILLS)} skills: {', '.join(skills.SKILLS)} (written to {FOLDER})", file=sys.stderr)
    import rich

    from talklora_pl.cli.lightning import run
    from talklora_pl.quickstart.report import experts_by_task, specialist_table

    # method files do not add up
    method = [] if any("method/" in arg for arg in argv) else ["--config", "method/talklora"]
    cli = run("fit", [*method, "--config", "quickstart", *argv])
    trainer, tuner = cli.trainer, cli.model
    trainer.test(tuner, datamodule=cli.datamodule, verbose=False)
    by_layer = experts_by_task(tuner, cli.datamodule.test_dataloader())
    log = trainer.log_dir  # a collective: outside of the condition
    if trainer.is_global_zero:
        if by_layer:
            rich.print(specialist_table(by_layer))
        print(NEXT.format(log=log, folder=FOLDER, python=_python()))


def _python() -> str:
    """How to type this interpreter: the environment that make has created need not be active."""
    here, program = Path.cwd(), Path(sys.executable)
    return str(program.relative_to(here)) if program.is_relative_to(here) else "python"
