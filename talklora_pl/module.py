"""The LightningModule: a frozen base model, an adapter, an objective, balance losses and an optimiser."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import rich
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from talklora_pl.adapter import AdapterConfig, disable_adapter, inject
from talklora_pl.adapter.io import adapter_metadata, base_fingerprint, state_tensors
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.adapter.upcycle import Upcycled, say_what_is_taken
from talklora_pl.adapter_module import AdapterModule
from talklora_pl.base import BaseModel, describe_base, load_base, load_generation, load_tokenizer, portable
from talklora_pl.base.description import Description
from talklora_pl.base.loading import new_modules, settle
from talklora_pl.callbacks.allocation import ExpertAllocation, refuse_other_allocation
from talklora_pl.callbacks.others import OtherCallbacks, refuse_callbacks, refuse_quantised, whole_precision
from talklora_pl.callbacks.out_of_memory import OutOfMemory
from talklora_pl.callbacks.run_metrics import RunMetrics
from talklora_pl.captured import CapturedSteps
from talklora_pl.compiled import CompiledLayers
from talklora_pl.distributed.checkpoint import refuse_differences
from talklora_pl.distributed.shards import compare_with_files
from talklora_pl.errors import UserError
from talklora_pl.evaluation import (
    BatchScores,
    Evaluation,
    Generation,
    TaskScores,
    judged,
    predictions,
    table,
    write_json,
    write_lines,
)
from talklora_pl.internals.lightning import logs_now, step_ends, trainer_of
from talklora_pl.memory import report
from talklora_pl.memory.checkpointing import Checkpointing, checkpoint_layers, mode_of
from talklora_pl.monitoring.host import read_back
from talklora_pl.names import ADAPTERS
from talklora_pl.objectives import Objective, choose
from talklora_pl.optim import ParamGroup, WarmupSchedule, grouped, take_fused_kernels, try_optimizer, watched
from talklora_pl.ranks import every_rank, over_ranks, sum_over_ranks
from talklora_pl.sites.left_out import summary
from talklora_pl.step import captured_steps, collector, forward
from talklora_pl.trials import reads_back_only
from talklora_pl.warm_start import SavedAdapter


class FineTuner(AdapterModule):
    """Fine-tunes a frozen Hugging Face model through an adapter.

    Args:
        base: which pretrained model.
        adapter: which mixture of experts; not needed with `adapter_path`, whose options it then has.
        objective: what is learned from the data; None: what the task of the base says.
        optimizer: of the trained tensors.
        lr_scheduler: stepped every optimiser step.
        param_groups: other learning rates or weight decays for some tensors; the first that matches counts.
        gradient_checkpointing: what decoder layers compute again in the backward pass, for memory: nothing (`off`),
            everything (`full`, or true), or all but matrix products and fused attention (`selective`).
        cuda_graph: record forward and backward passes on a GPU and replay them, for models so small that the GPU waits
            for its host; see :mod:`talklora_pl.captured`.
        compile: ``layers``: compile each decoder layer with ``torch.compile``, for training; ``model``: the whole
            model, in one piece as far as it goes. True is ``model``, False ``off``.
        evaluation: how answers are scored.
        adapter_path: an adapter to begin from, with a new optimiser and counters: an adapter folder, a checkpoint, a
            repository on the hub, or a LoRA folder of PEFT. Options of `adapter` that are given must be those it has
            (dropouts may differ).
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008 (never changed)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        param_groups: list[ParamGroup] | None = None,
        gradient_checkpointing: bool | Checkpointing = "off",
        compile: Literal["off", "layers", "model"] | bool = "off",
        cuda_graph: bool = False,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 (frozen)
        objective: Objective | None = None,
        adapter_path: str | None = None,
    ) -> None:
        super().__init__()
        self.base, self.objective = choose(base, objective)
        self.start = None if adapter_path is None else SavedAdapter.read(adapter_path)
        upcycled = Upcycled.read(adapter) if adapter.init_from else None
        if upcycled is not None:
            if adapter_path is not None:
                raise UserError(
                    "model.adapter_path and model.adapter.init_from both say what the adapter begins as; give one."
                )
            adapter = upcycled.config(adapter)
            say_what_is_taken(upcycled, adapter, base.path)
        self.adapter_config = self.start.config() if self.start and adapter == AdapterConfig() else adapter
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.param_groups = param_groups or []
        self.gradient_checkpointing = mode_of(gradient_checkpointing)
        self.compile_mode = compile if isinstance(compile, str) else "model" if compile else "off"
        self._compiled: CompiledLayers | None = None
        self._compared = False  # compiled gradients with eager ones
        self.cuda_graph = cuda_graph
        if cuda_graph and self.gradient_checkpointing != "off":
            raise UserError(
                "model.cuda_graph: a recorded step cannot compute layers again: gradient_checkpointing: off."
            )
        self._captured: CapturedSteps | None = None
        self.evaluation = evaluation
        self._told_of_idle = False
        self.allocation = self.start.metadata.experts_per_layer if self.start else None
        self.model = None
        self.routing = []
        # checkpoints hold what is trained; on_load_checkpoint checks that all of it is there
        self.strict_loading = False
        self._fingerprint: str | None = None
        self._step_sums: dict[str, Tensor] = {}  # of the micro-batches so far of the optimiser step

    def configure_callbacks(self) -> list[L.Callback]:
        """Allocation needs a hook that runs before :meth:`configure_model`; also the first hook of a run, to refuse."""
        refuse_callbacks(self.trainer, self)
        refuse_quantised(self.trainer, self)
        whole_precision(self.trainer, self)
        listed = {type(c) for c in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in (ExpertAllocation, OtherCallbacks, RunMetrics, OutOfMemory) if kind not in listed]

    # --- building

    def setup(self, stage: str) -> None:
        """A classifier whose number of classes nobody says has those of its data."""
        classes = getattr(self._datamodule, "num_classes", None)
        if self.base.head.classifies and self.base.num_labels is None and classes is not None:
            self.base = replace(self.base, num_labels=classes)

    def configure_model(self) -> None:
        """Load the base, freeze it and inject the adapter. Called again, it does nothing."""
        if self.model is None:
            # Lightning makes the GPU the default device here, which nothing is written for: what belongs there says so
            with torch.device("cpu"):
                self._build()

    def _build(self) -> None:
        self.adapter_config.validate()
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit" and trainer.is_global_zero:
            report.say(self, self._datamodule, self.device)
        # a strategy that shards the base also reads it, each process its own part
        meta = getattr(getattr(trainer, "strategy", None), "loads_base", False)
        self.model = load_base(self.base, self.device, meta)
        if meta and self.base.head.classifies:
            settle(self.model, self.base.path, compare_with_files(self.model, self.base.revision), new_head=True)
        self._inject(self.model, self.adapter_config, self.device)
        if self.start:
            self.start.load(self.model, self.device)
            self.start.check_base(self.model)
        warm_start = self.start is not None or bool(self.adapter_config.init_from)
        self.objective.after_adapter(self.model, warm_start)
        checkpoint_layers(self.model, self.gradient_checkpointing)
        if self.compile_mode == "model":
            self.model.compile()
        elif self.compile_mode == "layers":
            self._compiled = CompiledLayers(self.model)
        self.model.train()

    def meta_model(self, device: torch.device | None = None) -> Any:
        """The model on the meta device, with its adapter and without weights; `device`: where it would run."""
        config = self.adapter_config
        model = load_base(self.base, device, meta=True)
        # a rule that reads weights has none to read here
        self._inject(model, config if self.start or self.allocation else config.before_allocation())
        return model

    def base_bytes(self, device: torch.device | None = None) -> int:
        """Size of the base's weights."""
        return sum(p.numel() * p.element_size() for p in load_base(self.base, device, meta=True).parameters())

    def check(self) -> None:
        """Build everything on the meta device, without weights, to find mistakes before any long work.

        Raises:
            UserError: about the base, the adapter's options or targets, the parameter groups, the optimiser or the
                schedule.
        """
        config, problems = self.adapter_config, list[str]()
        model: Any = None
        groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(1, 1))]}]  # if there will be no others

        def load() -> None:
            nonlocal model
            model = load_base(self.base, meta=True)

        def inject() -> None:
            nonlocal groups
            if model is not None:
                config.experts.site.find(
                    model, config.targets, config.exclude, config.layers, keep=self.allocation or ()
                )
            if not problems:
                # a rule that reads weights has none to read here
                self._inject(model, config if self.start else config.before_allocation())
                groups = grouped(trained_tensors(model), self.param_groups)

        def generation() -> None:
            if self.evaluation.generation == "base":
                load_generation(self.base)

        for part in (
            config.validate,
            load,
            generation,
            inject,
            lambda: try_optimizer(self.optimizer, self.lr_scheduler, groups),
        ):
            try:
                part()
            except UserError as e:
                problems.append(str(e))
        if problems:
            raise UserError("\n".join(problems))

    def count_trained(self) -> int:
        """Number of trained parameters, of every layer having ``num_experts``; needs no weights."""
        model = load_base(self.base, meta=True)
        self._inject(model, self.adapter_config.before_allocation())
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _inject(self, model: Any, config: AdapterConfig, device: torch.device | None = None) -> None:
        saved = {*config.modules_to_save, *self.objective.modules_to_save(model)}
        new = {n for n in new_modules(model) if not any(f"{n}.".startswith(f"{module}.") for module in saved)}
        if saved | new:
            config = replace(config, modules_to_save=sorted(saved | new))
        config = self.objective.before_adapter(model, config)
        if self.start:
            self.start.check(model, config, self.base)
        inject(model, config, allocation=self.allocation, device=device)
        if self.start:
            self.start.check_tensors(model)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name, without the prefix that all of them have."""
        return trained_tensors(self.model)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(grouped(self.trained(), self.param_groups))
        take_fused_kernels(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = self._schedule(optimizer)
        plan = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):  # OtherCallbacks steps it
            plan |= {"monitor": watched(scheduler), "strict": False, "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def _schedule(self, optimizer: Optimizer) -> Any:
        assert self.lr_scheduler is not None
        scheduler = self.lr_scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:
            steps = self.trainer.estimated_stepping_batches
            if steps == math.inf:
                raise UserError(
                    "model.lr_scheduler: a run that ends by time does not know its steps. Give it total_steps."
                )
            if isinstance(scheduler, WarmupSchedule):
                scheduler.plan(int(steps))
            else:
                setattr(scheduler, "total_steps", int(steps))  # noqa: B010
        return scheduler

    @property
    def learning_rate(self) -> float:
        """Of the optimiser's first group; setting it before the first step (as LearningRateFinder does) also begins the
        schedule anew from it."""
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = value
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler = self._schedule(self.trainer.optimizers[0])

    # --- training

    def on_train_start(self) -> None:
        # a finder's trials end anywhere
        self._step_sums = {}
        self.adapter.forget_loads()
        if not self.base.head.classifies:
            reads_back_only(self.model)  # tried out now, and not amid the first step
        self._captured = captured_steps(self) if self.cuda_graph else None

    def on_fit_start(self) -> None:
        # while all processes are alive: the weights may be sharded
        self._fingerprint = self.adapter_metadata().base.fingerprint
        if self.start:
            self.start.check_base(self.model)  # weights that a strategy has only now read
            if self.trainer.ckpt_path is None:
                rank_zero_info(f"Begins from the adapter in {self.start.path}, with a new optimiser at step 0.")
            self.start = None
        trained = sum(p.numel() for p in self.trained().values())
        base = self.model.num_parameters() - sum(p.numel() for p in getattr(self.model, ADAPTERS).parameters())
        rank_zero_info(f"Trained: {trained:,} parameters beside the {base:,} of the base.")

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Task loss over all tokens of the optimiser step, plus balance losses averaged over its micro-steps."""
        if self._compiled and not self._compared:
            self._compare_compiled(self._compiled, batch)
        # Lightning divides by the accumulation and DDP by the ranks: undo both, then divide by all tokens of the step
        accumulate = self.trainer.accumulate_grad_batches
        copies = self.trainer.world_size * accumulate
        balance_weight = accumulate / batch.get("micro_steps", accumulate)
        tokens = batch.get("step_tokens")
        if self._captured and "loss_index" not in batch:
            self._captured = None
            rank_zero_warn("model.cuda_graph: steps are not recorded: batches have no loss_index (inputs.labelled).")
        if self._captured and not batch.get("filler"):
            tokens = tokens or over_ranks([len(batch["loss_index"])], "sum")[0] * accumulate
            loss, passed = self._captured(batch, {"weight": copies / tokens, "balance_weight": balance_weight})
        else:
            passed = forward(self.model, self.objective, batch)
            # not every data module says how much of an optimiser step carries loss
            tokens = tokens or over_ranks([passed.count], "sum")[0] * accumulate
            loss = passed.loss(copies / tokens, balance_weight)
        self.routing = passed.routing
        self.adapter.count_loads(self.routing)
        for name, value in passed.each.items():
            self.log(f"balance/{name}", value, batch_size=1)
        for name, value in passed.sums.items():
            share = value.detach() * (self.trainer.world_size / tokens)
            self._step_sums[name] = self._step_sums[name] + share if name in self._step_sums else share
        if step_ends(self.trainer):
            # their mean over ranks is the mean over all tokens of the step, however they are spread
            of_all_ranks = zip(self._step_sums, sum_over_ranks(*self._step_sums.values()), strict=True)
            bar = self.trainer.progress_bar_callback
            # Lightning reads what it shows at every step, and the host waits; our own bar looks for itself
            shown = bar is not None and not _asks_by_itself(bar)
            for name, value in of_all_ranks:
                mean = value / self.trainer.world_size
                self.log(name, mean, prog_bar=shown and name == "train_loss", batch_size=1)
            self._step_sums = {}
        return loss

    def _compare_compiled(self, layers: CompiledLayers, batch: dict[str, Any]) -> None:
        """On the first batch: what compiled layers learn is what they would learn as they are, or they are left so."""
        self._compared = True

        def loss() -> Tensor:
            with collector(self.model, batch) as collected:
                task, count, *_ = self.objective.loss(self.model, batch)
            routing = [r.routing.probs_TE.square().mean() for r in collected.records]
            return task / max(count, 1) + sum(routing)

        layers.on = not (reason := layers.why_not_trusted(list(self.trained().values()), loss))
        if reason:
            rank_zero_warn(f"model.compile: layers: the layers are not compiled: {reason}.")

    def on_train_end(self) -> None:
        self._captured = None  # its memory is wanted for what follows

    def on_after_backward(self) -> None:
        """Tell once, after the first batch, of trained tensors that its loss does not reach."""
        if self._told_of_idle:
            return
        self._told_of_idle = True
        if idle := [n for n, p in self.trained().items() if p.grad is None]:
            rank_zero_warn(
                f"The first batch gave no gradient to {len(idle)} trained tensors: {summary(idle)}. Their modules did "
                "not run, or the model (a kernel that is installed for it) reads their weight itself; what does not "
                "learn is better left out: model.adapter.exclude."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then routers that balance themselves; a checkpoint of this step is written after both."""
        super().optimizer_step(*args, **kwargs)
        self.adapter.after_optimizer_step()

    def on_train_batch_end(self, *args: Any) -> None:
        """After all callbacks, and before Lightning reads one by one what they and the step have logged."""
        if logs_now(self.trainer) and (self.trainer.loggers or _asks_by_itself(self.trainer.progress_bar_callback)):
            read_back(self.trainer)
        self.routing = []

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but a number that the host has stays with it, where it can be read without a wait."""
        if isinstance(value, int | float) and not kwargs.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        super().log(name, value, *args, **kwargs)

    # --- evaluation

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.base)

    @functools.cached_property
    def description(self) -> Description:
        """Facts of the base."""
        return describe_base(self.base)

    @property
    def _datamodule(self) -> Any:
        return getattr(trainer_of(self), "datamodule", None)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        eos_id = getattr(self._datamodule, "eos_id", None)
        return self.tokenizer.eos_token_id if eos_id is None else eos_id

    def generation(self, max_new_tokens: int | None = None) -> Generation:
        options = self.evaluation
        if max_new_tokens is not None:
            options = replace(options, max_new_tokens=max_new_tokens)
        shared = self.device_mesh is not None  # the model, by the ranks
        any_rank = (lambda here: self.trainer.strategy.reduce_boolean_decision(here, all=False)) if shared else None
        return Generation(self.model, self.tokenizer, self.description, self.eos_id, options, any_rank)

    @torch.no_grad()
    def score(self, batch: dict[str, Any], generate: bool = False) -> BatchScores:
        """Score an evaluation batch with the model as it is now, adapter on or off.

        Args:
            batch: on the model's device.
            generate: also answer what is open, by generating up to ``evaluation.max_new_tokens``.
        """
        answer = self.generation() if generate and self.evaluation.max_new_tokens else None
        return self.objective.score(self.model, batch, answer)

    def on_validation_epoch_start(self) -> None:
        self.scores = TaskScores(self._tasks()).to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.scores.update(self.score(batch), self._tasks(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.scores.compute())

    @property
    def _compare_base(self) -> bool:
        return self.evaluation.compare_base and self.objective.base_has_score

    def on_test_epoch_start(self) -> None:
        self.scores = TaskScores(self._tasks()).to(self.device)
        self.base_scores = TaskScores(self._tasks()).to(self.device)
        self.questions: list[dict[str, Any]] = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        scored = self.score(batch, generate=True)
        self.scores.update(scored, self._tasks(batch))
        if "index" in batch:  # a data module of one's own may not number its questions
            self.questions += judged(scored, batch)
        if self._compare_base:
            with disable_adapter(self.model):
                self.base_scores.update(self.score(batch, generate=True), self._tasks(batch))

    def on_test_epoch_end(self) -> None:
        tuned, base = self.scores.compute(), self.base_scores.compute() if self._compare_base else None
        self._log_scores("test", tuned)
        path = self._output("test_scores.json")
        questions = self._of_all_ranks(self.questions)
        if self.trainer.is_global_zero:
            write_lines(path.with_name("test_questions.jsonl"), questions)
            write_json(path, tuned, base)
            rich.print(table(tuned, base), f"Scores as JSON: {path}", sep="\n")

    def on_predict_epoch_start(self) -> None:
        self.predictions: list[dict[str, Any]] = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        records = predictions(self.score(batch, generate=True), batch)
        self.predictions += records
        return records

    def on_predict_epoch_end(self) -> None:
        records = self._of_all_ranks(self.predictions)
        path = self._output("predictions.jsonl")
        if self.trainer.is_global_zero:
            write_lines(path, records)
            rich.print(f"{len(records)} predictions: {path}")

    def _of_all_ranks(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """In the order of the data, which their `index` gives; a collective."""
        return sorted((r for rank in every_rank(records) for r in rank), key=lambda r: r.pop("index"))

    def _tasks(self, batch: dict[str, Any] | None = None) -> list[str]:
        """All tasks there are, or those of a batch's questions; a data module without tasks has one."""
        tasks = getattr(self._datamodule, "tasks", None)
        if batch is None:
            return tasks or ["all"]
        return batch["task"] if tasks else ["all"] * len(batch.get("answer", batch["input_ids"]))

    def _log_scores(self, stage: str, scores: dict[str, dict[str, float]]) -> None:
        several = len(scores) > 2  # one task, and the mean
        for task, values in scores.items():
            for name in values:  # in one order on all ranks: logging is a collective
                if name == "questions":
                    continue
                if task == "mean":
                    self.log(f"{stage}_{name}", values[name], prog_bar=stage == "val", sync_dist=True)
                elif several:
                    self.log(f"{stage}_{name}/{task}", values[name], sync_dist=True)

    def _output(self, name: str) -> Path:
        """Where a file of results goes; asked on all ranks, since the log folder is broadcast."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    # --- checkpoints

    def adapter_metadata(self, like: str | None = None) -> AdapterMetadata:
        base: dict[str, Any] = {
            "name_or_path": portable(self.base.path),
            "task": self.base.task,
            "num_labels": self.base.num_labels,
        }
        if self.base.quantization is not None:  # the model on the meta device does not know
            base["quantization"] = self.base.quantization
        if self.base.revision is not None:
            base["revision"] = self.base.revision
        if like is not None:
            base["fingerprint"] = base_fingerprint(self.model, like=like)
        elif self._fingerprint is not None:
            base["fingerprint"] = self._fingerprint
        return adapter_metadata(self.model, **base)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained tensors and the adapter's buffers; the base is not ours to store."""
        keep = {f"model.{k}" for k in state_tensors(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
        checkpoint["talklora"] = self.adapter_metadata().to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError if a trained tensor is missing or has another shape, or was trained as part of another
        method. (A fit compares more, see :class:`~talklora_pl.callbacks.resume.ExactResume`.)"""
        if saved := checkpoint.get("talklora"):
            path = self.trainer.ckpt_path or ""
            metadata = AdapterMetadata.from_dict(saved, path)
            refuse_other_allocation(metadata, self)
            if self.trainer.state.fn != "fit":
                refuse_differences(metadata.method(), self.adapter_metadata().method(), path)
        have = checkpoint["state_dict"]
        for key, value in state_tensors(self.model).items():
            if f"model.{key}" not in have:
                raise UserError(f"The checkpoint lacks {key!r}; it was written by a run with another method or base.")
            if have[f"model.{key}"].shape != value.shape:
                got, want = list(have[f"model.{key}"].shape), list(value.shape)
                raise UserError(f"The checkpoint's {key!r} has shape {got}, this run needs {want}.")
        others = (k.removeprefix("model.talklora.").split(".")[0] for k in have if k.startswith("model.talklora."))
        if lost := sorted(set(others) - set(self.model.talklora)):
            raise UserError(
                f"The checkpoint also holds the adapter {lost[0]!r}, which its run began from and compares with. Give "
                "model.adapter_path (and model.objective) as that run had them."
            )


def _asks_by_itself(bar: Any) -> bool:
    return getattr(bar, "asks_by_itself", False)


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained tensors of a model; those of the adapter by their names in it, those of the base after ``model.``."""
    named = ((f"model.{name}", p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("model.talklora.default."): p for name, p in named}
