"""LightningCLI with our defaults: shipped configs by name, plugins, every mistake in one message."""

from __future__ import annotations

import importlib.util
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from talklora_pl import callbacks, registry
from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.cli.parser import Parser
from talklora_pl.cli.problems import all_problems, readable
from talklora_pl.data import TextData
from talklora_pl.distributed.launch import allocation_of, resume_from, trainer_arguments, version_of
from talklora_pl.errors import UserError
from talklora_pl.module import FineTuner

RUNS = "runs"
"""Where runs are kept unless ``--trainer.default_root_dir`` says otherwise."""

BESIDE = {
    "model": ("data.", "trainer."),
    "data": ("model.adapter.", "model.optimizer", "model.lr_scheduler", "trainer."),
}
"""Options that do not matter to the check of the model and of the data."""


# --- configs by name


def shipped_configs() -> Path:
    """The folder of the configs that come with the package."""
    spec = importlib.util.find_spec("talklora_pl.configs")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        return Path(folder)
    raise UserError("The configs folder of talklora_pl is missing from this installation.")


def find_config(name: str) -> str:
    """Path of a config: a file, or the name of a shipped one such as ``method/talklora``.

    Raises:
        UserError: neither.
    """
    folder = shipped_configs()
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    raise UserError(
        f"--config: there is no file {name!r} and no shipped config of that name.{registry.did_you_mean(name, known)}"
    )


def _expand(argv: list[str]) -> list[str]:
    """Replace config names by their paths."""
    out = []
    for before, arg in zip(["", *argv], argv, strict=False):
        if before in ("--config", "-c"):
            arg = find_config(arg)
        elif arg.startswith("--config="):
            arg = "--config=" + find_config(arg.removeprefix("--config="))
        out.append(arg)
    return out


def _yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{where} is not readable as YAML: {' '.join(str(e).split())}") from None


def _plugins(argv: list[str]) -> list[str]:
    """Plugins named by configs and options, found before anything is parsed."""
    found: list[Any] = []
    for before, arg in zip(["", *argv], argv, strict=False):
        if before in ("--config", "-c") or arg.startswith("--config="):
            path = arg.removeprefix("--config=")
            data = _yaml(Path(path).read_bytes(), path)
            if data is not None and not isinstance(data, dict):
                raise UserError(f"{path}: a config is a mapping of options, this is a {type(data).__name__}.")
            found.append((data or {}).get("plugins") or [])
        elif before in ("--plugins", "--plugins+") or arg.startswith(("--plugins=", "--plugins+=")):
            found.append(_yaml(arg.split("=", 1)[-1], "--plugins"))
    plugins = [p for entry in found for p in (entry if isinstance(entry, list) else [entry])]
    if wrong := [p for p in plugins if not isinstance(p, str)]:
        raise UserError(f"plugins: a list of modules or .py files, and {wrong[0]!r} is neither.")
    return plugins


class CLI(LightningCLI):
    """fit, validate, test and predict for :class:`FineTuner` and :class:`TextData`."""

    def __init__(self, verb: str, argv: list[str]) -> None:
        self.verb, self.options = verb, argv
        # only the parser that is asked for is built
        verbs = LightningCLI.subcommands()
        self.subcommands = lambda: {verb: verbs[verb]}  # type: ignore[method-assign]
        super().__init__(
            FineTuner,
            TextData,
            # scores have a table of their own
            args=[verb, *(["--verbose=false"] if verb == "test" else []), *argv],
            parser_class=Parser,
            parser_kwargs={"prog": "python -m talklora_pl"},
            seed_everything_default=42,
            # an evaluation writes into the folder of the run whose checkpoint it reads: the config there is the fit's
            save_config_callback=SaveConfigCallback if verb == "fit" else None,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 10},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--plugins", type=list[str], default=[], help="modules or .py files with your own components"
        )
        parser.link_arguments("model.base", "data.base")
        parser.link_arguments("model.objective", "data.objective")
        parser.add_lightning_class_args(callbacks.Checkpoint, "checkpoint")
        parser.add_lightning_class_args(callbacks.AdapterExport, "export")
        parser.add_lightning_class_args(callbacks.LoadBalance, "load_balance")
        parser.add_lightning_class_args(callbacks.ExactResume, "resume")
        parser.add_lightning_class_args(callbacks.FiniteGuard, "guard")
        parser.add_lightning_class_args(callbacks.Preemption, "preemption")
        parser.add_lightning_class_args(callbacks.Peers, "peers")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning warns where args meet a non-empty sys.argv, which its launcher of further processes needs later
        program, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        except UserError as e:
            raise self._all_problems(e) from None
        finally:
            sys.argv = program

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as e:  # a part refuses the value of an option
            raise self._all_problems(e) from e
        except UserError as e:
            if not hasattr(self, "model"):
                raise
            raise UserError("\n".join([str(e), *self._check(self.model, self.datamodule)])) from e

    def after_instantiate_classes(self) -> None:
        try:
            self.model.check()
        except UserError:
            # what is wrong with the data would come next: say it now (good data only get cached by this)
            raise UserError("\n".join(self._check(self.model, self.datamodule))) from None
        self.model.allocation = allocation_of(self.config_init[self.verb].ckpt_path)
        if (root := self._get(self.config, "trainer").default_root_dir) is not None:
            try:
                Path(root).mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"trainer.default_root_dir: {root} cannot be made: {e.strerror}.") from None

    def _all_problems(self, first: Exception) -> UserError:
        """Each wrong option with its place, then what is wrong with the parts that none of them touches."""

        def build(options: list[str]) -> Any:
            config = self.parser.parse_args([self.verb, *options])
            try:
                return self.parser.instantiate_classes(config)[self.verb]
            except ValueError as e:
                raise UserError(readable(str(e))) from e

        found = all_problems(build, self.options, {"model.base.path": "x"})
        if not found.problems:
            return UserError(str(first))
        problems = ["The configuration cannot be used:", *found.problems]
        if all(key.startswith(BESIDE["model"] + BESIDE["data"]) for key in found.wrong):
            left = build(found.right)
            problems += self._check(left.model, left.data, found.wrong)
        return UserError("\n".join(problems).replace("\n", "\n  "))

    def _check(self, model: FineTuner, data: TextData, wrong: Sequence[str] = ()) -> list[str]:
        """What only building the model and reading the data shows, where no wrong option can be the reason."""
        checks = {"model": model.check, "data": lambda: data.check(self.verb)}
        out: list[str] = []
        for part, check in checks.items():
            if all(key.startswith(BESIDE[part]) for key in wrong):
                try:
                    check()
                except UserError as e:
                    out += str(e).splitlines()
        return list(dict.fromkeys(out))

    def _parse_ckpt_path(self) -> None:
        """Find and check the checkpoint; what the user typed wins, nothing is taken from its hyperparameters."""
        config = self.config[self.config.subcommand]
        root = config.trainer.default_root_dir or RUNS
        config.ckpt_path = resume_from(config.ckpt_path, root, config.checkpoint.dirpath, self.config.subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config_init, "trainer")
        kwargs |= trainer_arguments(config)
        if config.get("logger") in (None, True):
            root = config.get("default_root_dir") or RUNS
            version = version_of(self._get(self.config_init, "ckpt_path"), root)
            kwargs["logger"] = TensorBoardLogger(root, name="", version=version)
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in own):
            kwargs["callbacks"] = [*own, EpochProgress()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as e:
            raise UserError(f"trainer: {' '.join(str(e).split())}") from e


def run(verb: str, argv: list[str]) -> CLI:
    """Parse ``argv`` and run one of Lightning's verbs; the result has ``trainer``, ``model`` and ``datamodule``."""
    # of Lightning's own making, and nothing a user could act upon
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation data
    warnings.formatwarning = _one_line
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    argv = _expand(argv)
    registry.import_plugins(_plugins(argv))
    try:
        return CLI(verb, argv)
    except (MisconfigurationException, ValueError) as e:
        if _raised_by_lightning(e):
            raise UserError(f"trainer: {' '.join(str(e).split())}") from e
        raise


_with_place = warnings.formatwarning


def _one_line(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
    """What is for a user, without the line of code that says it."""
    return f"warning: {message}\n" if category is UserWarning else _with_place(message, category, *place, **line)


def _raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself refused something, as opposed to what it called."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("lightning.")
