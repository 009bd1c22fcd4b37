"""LightningCLI with our defaults: shipped configs by name, plugins, every mistake in one message."""

from __future__ import annotations

import inspect
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import register_type
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.enums import StrEnum

from talklora_pl import callbacks, registry
from talklora_pl.callbacks.others import refuse_callbacks
from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.cli.check import Check
from talklora_pl.cli.options import Option, plugins, right, split, start_options
from talklora_pl.cli.trainer import RunLogger, RunPlace, RunRecord, Trainer
from talklora_pl.data import TextData
from talklora_pl.data.objects import RowsInPython
from talklora_pl.distributed.launch import allocation_of, classes_of, place_of, resume_from, trainer_arguments
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import raised_by_lightning
from talklora_pl.memory.report import is_out_of_memory, print_estimate
from talklora_pl.module import FineTuner
from talklora_pl.paths import expand
from talklora_pl.runs import RUNS
from talklora_pl.shipped import shipped_configs

# so that options with such values can be kept in a config.yaml
register_type(torch.device)
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))
yaml.SafeDumper.add_representer(RowsInPython, lambda dumper, rows: dumper.represent_str(str(rows)))

EPOCHS = 3
"""How long a fit trains that is given no end."""

ALWAYS: dict[str, type[L.Callback]] = {
    "checkpoint": callbacks.Checkpoint,
    "export": callbacks.AdapterExport,
    "load_balance": callbacks.LoadBalance,
    "samples": callbacks.SampleOutputs,
    "resume": callbacks.ExactResume,
    "guard": callbacks.FiniteGuard,
    "preemption": callbacks.Preemption,
    "peers": callbacks.Peers,
}
"""Callbacks of every run, each with a section of its own."""

BESIDE = {
    "model": ("data.", "trainer."),
    "data": ("model.adapter.", "model.optimizer", "model.lr_scheduler", "trainer."),
}
"""Options that do not matter to the check of the model and of the data."""


class CLI(LightningCLI):
    """fit, validate, test and predict for :class:`FineTuner` and :class:`TextData`.

    Args:
        verb: one of the four.
        argv: its options.
        more: further options, which come after them.
        objects: what no text can hold, by the keys of the options: rows in Python (``data.train``, or
            ``data.train.0.path`` in a list of sources), and arguments of the Trainer.

    Raises:
        UserError: all that is wrong with them, found before anything is loaded.
    """

    def __init__(
        self, verb: str, argv: list[str], more: Sequence[Option] = (), objects: Mapping[str, Any] | None = None
    ) -> None:
        self.verb = verb
        self.objects = dict(objects or {})
        options = [*split(argv), *more]
        self.method = _method(options)
        registry.import_plugins(plugins(options))
        self.check = Check(
            {"trainer": L.Trainer, "model": FineTuner, "data": TextData, **ALWAYS},
            {
                "seed_everything": bool | int,
                "plugins": list[str],
                "run_name": str | None,
                **self._arguments_of_verb(),
            },
            linked=("data.base", "data.objective"),
        )
        args = right([*start_options(options), *options], self.check)
        if verb == "fit" and not self._has_end():
            args = [f"--trainer.max_epochs={EPOCHS}", *args]  # what follows a class's .help belongs to that class
            if not self.check.problems and not any(option.asks for option in options):
                rank_zero_info(f"No end is given: training ends after {EPOCHS} epochs (--trainer.max_epochs).")
        if not any(self._checks(part) for part in BESIDE):
            raise self._refusal()
        super().__init__(
            FineTuner,
            TextData,
            # scores have a table of their own
            args=[verb, *(["--verbose=false"] if verb == "test" else []), *args],
            parser_kwargs={"prog": "python -m talklora_pl", "exit_on_error": False, verb: {"exit_on_error": False}},
            seed_everything_default=42,
            # an evaluation writes into the folder of the run whose checkpoint it reads: the config there is the fit's
            save_config_callback=RunRecord if verb == "fit" else None,
            save_config_kwargs={"overwrite": True, "about": {"method": self.method}},
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "use_distributed_sampler": False,
                "log_every_n_steps": 10,
                # it cannot count FLOPs here and takes every weight for 4 bytes; FineTuner says what is trained
                "enable_model_summary": False,
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is asked for: only its parser is built."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def _arguments_of_verb(self) -> dict[str, Any]:
        skipped = {"self", *self.subcommands()[self.verb]}
        takes = inspect.signature(getattr(L.Trainer, self.verb)).parameters
        return {name: p.annotation for name, p in takes.items() if name not in skipped}

    def _has_end(self) -> bool:
        """Whether the options say when training ends."""
        given = [chosen.options for chosen in self.check.chosen["trainer"]]
        nothing = {
            "max_steps": (None, -1),
            "max_epochs": (None,),
            "max_time": (None,),
            "fast_dev_run": (None, False, 0),
        }
        return any(options.get(name) not in no for options in given for name, no in nothing.items())

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--plugins", type=list[str], default=[], help="modules or .py files with your own components"
        )
        parser.add_argument(
            "--run_name", type=str | None, default=None, help="folder of the run; by default version_N, a new number"
        )
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.objective", "data.objective")
        for section, callback in ALWAYS.items():
            parser.add_lightning_class_args(callback, section)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as e:
            raise self._refusal(*[] if self.check.problems else [_first_line(e)]) from None
        # kept from Lightning, which would take hyperparameters from the checkpoint: what the user typed holds
        self.ckpt_path = self.config[self.verb].pop("ckpt_path")
        for key, value in self.objects.items():
            section, name, *place = key.split(".")
            if section == "data":
                _put(self.config[self.verb].data, [name, *place], value)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.verb]
        for section, option in ((config.trainer, "default_root_dir"), (config.checkpoint, "dirpath")):
            section[option] = section[option] and expand(section[option])
        config.export.dirpath = config.export.dirpath and expand(config.export.dirpath)
        self.ckpt_path = self.ckpt_path and expand(self.ckpt_path)
        if self.check.problems:
            try:
                built = self.parser.instantiate_classes(self.config)[self.verb]
            except (ValueError, UserError):
                raise self._refusal() from None
            raise self._refusal(*self._check(built.model, built.data))
        root, name = Path(config.trainer.default_root_dir or RUNS), config.run_name
        if name is not None and (not name or Path(name).name != name or name.startswith(".")):
            raise UserError(f"--run_name: {name!r} is not the name of a folder in {root}.")
        dirpath, fits = config.checkpoint.dirpath, self.verb == "fit"
        trained = config.model.adapter_path is not None
        config.ckpt_path = resume_from(self.ckpt_path, root, dirpath, self.verb, trained, name)
        run = place_of(config.ckpt_path, root, name, self.ckpt_path, fits)
        self.place = RunPlace(root, name, run, config.ckpt_path, fits, dirpath, config.export.dirpath)
        self.place.check()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as e:  # a class refuses the value of an option
            raise self._refusal(*[] if self.check.refused() else [_first_line(e)]) from e
        except UserError as e:
            if not hasattr(self, "model"):
                raise
            raise UserError("\n".join([str(e), *self._check(self.model, self.datamodule)])) from e

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init[self.verb].trainer
        kwargs |= trainer_arguments(config)
        if config.get("logger") in (None, True):
            kwargs["logger"] = RunLogger(str(self.place.root))
        given = {key.removeprefix("trainer."): v for key, v in self.objects.items() if key.startswith("trainer.")}
        self.place.moves_logs = "logger" not in given
        own = config.get("callbacks") or []
        own = [*(own if isinstance(own, list) else [own]), *given.pop("callbacks", [])]
        # before the one that ends a run in the middle of this hook's callbacks
        own = [*own, callbacks.RunMetrics()]
        kwargs |= {"callbacks": own, **given}
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in own):
            kwargs["callbacks"] = [*own, EpochProgress()]
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as e:
            raise UserError(f"trainer: {' '.join(str(e).split())}") from e
        if not config.get("fast_dev_run"):
            trainer.place = self.place
        # the others log as soon as there is something to log to
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunRecord))
        return trainer

    def after_instantiate_classes(self) -> None:
        self.model.method = self.method
        refuse_callbacks(self.trainer, self.model)
        try:
            self.model.check()
        except UserError:
            # what is wrong with the data would come next: say it now (good data only get cached by this)
            raise UserError("\n".join(self._check(self.model, self.datamodule))) from None
        checkpoint = self.config_init[self.verb].ckpt_path
        self.model.allocation = allocation_of(checkpoint) or self.model.allocation
        if classes := classes_of(checkpoint):
            self.datamodule.load_state_dict(classes)
        if (root := self.config[self.verb].trainer.default_root_dir) is not None:
            try:
                Path(root).mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"trainer.default_root_dir: {root} cannot be made: {e.strerror}.") from None

    def _checks(self, part: str) -> bool:
        """Whether no wrong option can be the reason for what the check of a part finds."""
        return all(key.startswith(BESIDE[part]) for _, key, _ in self.check.problems)

    def _check(self, model: FineTuner, data: TextData) -> Iterable[str]:
        """What only building the model and reading the data shows."""
        out: list[str] = []
        for part, check in {"model": model.check, "data": lambda: data.check(self.verb)}.items():
            if self._checks(part):
                try:
                    check()
                except UserError as e:
                    out += str(e).splitlines()
        return dict.fromkeys(out)

    def _refusal(self, *more: str) -> UserError:
        """All problems in one message."""
        return UserError("\n  ".join(["The configuration cannot be used:", *map(str, self.check.problems), *more]))


def _put(config: Any, place: list[str], value: Any) -> None:
    """Set one entry of a parsed config, which may lie in a list."""
    *outer, last = place
    for name in outer:
        config = config[int(name)] if isinstance(config, list) else config[name]
    config[int(last) if isinstance(config, list) else last] = value


def run(verb: str, argv: list[str], cli: Callable[[str, list[str]], CLI] = CLI) -> CLI:
    """Parse ``argv`` and run one of Lightning's verbs; the result has ``trainer``, ``model`` and ``datamodule``."""
    quiet()
    try:
        return cli(verb, argv)
    except (MisconfigurationException, ValueError) as e:
        if raised_by_lightning(e):
            raise UserError(f"trainer: {' '.join(str(e).split())}") from e
        raise
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise UserError("\n".join([f"Out of memory: {_first_line(e)}", *getattr(e, "__notes__", [])])) from e
        raise


def quiet() -> None:
    """Warnings are for a user, and on one line."""
    # of Lightning's own making, and nothing a user could act upon
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation data
    warnings.filterwarnings(
        "ignore", "When using `Trainer\\(accumulate_grad_batches"
    )  # the hooks are per step on purpose
    warnings.filterwarnings("ignore", "The `srun` command is available")  # docs/distributed.md says when to use it
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # only that of this run does
    warnings.filterwarnings("once", 'install "ipywidgets"')  # rich, of each of its bars in a notebook
    warnings.formatwarning = _one_line
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    log = logging.getLogger("lightning.pytorch")
    log.handlers = [_AboveTheBar() if type(h) is logging.StreamHandler else h for h in log.handlers]


NO_NEWS = ("litlogger", "returned in `LightningModule.configure_", "TPU available: False")
"""In lines of Lightning about what this run neither has nor lacks."""


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in NO_NEWS)


class _AboveTheBar(logging.Handler):
    """Writes to what ``sys.stderr`` is now: a live progress bar puts itself in its place, and lets lines through above
    it. On a terminal words stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            fill = partial(textwrap.fill, width=width, subsequent_indent="  ", break_long_words=False)
            text = "\n".join(fill(line, break_on_hyphens=False, replace_whitespace=False) for line in text.split("\n"))
        print(text, file=sys.stderr)


class _Unrun(CLI):
    """Ends before the fit begins."""

    class Built(Exception):
        pass

    def before_fit(self) -> None:
        raise self.Built(self)


def built(argv: list[str]) -> CLI:
    """What a fit with these options would be: checked and built, without weights; nothing is run or written."""
    try:
        return run("fit", argv, _Unrun)
    except _Unrun.Built as e:
        cli: CLI = e.args[0]
        return cli


def main(verb: str, argv: list[str]) -> None:
    """The verb. ``fit --estimate`` prints the memory that the fit would take, and stops."""
    if verb != "fit" or "--estimate" not in argv:
        run(verb, argv)
        return
    cli = built([arg for arg in argv if arg != "--estimate"])
    print_estimate(cli.model, cli.datamodule, cli.trainer.accumulate_grad_batches > 1)


def _method(options: list[Option]) -> str | None:
    """Name of the shipped method among the configs."""
    folder = shipped_configs() / "method"
    names = [Path(option.file).stem for option in options if Path(option.file).parent == folder]
    return names[-1] if names else None


def _first_line(error: Exception) -> str:
    """Its first line that says something."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


_with_place = warnings.formatwarning


def _one_line(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
    """What is for a user, without the line of code that says it."""
    return (
        f"warning: {message}\n" if issubclass(category, UserWarning) else _with_place(message, category, *place, **line)
    )
