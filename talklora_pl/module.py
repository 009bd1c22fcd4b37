"""The LightningModule: a frozen base model, an adapter, balance losses and an optimiser.

B batch, S sequence, V vocabulary, N positions that carry loss.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from talklora_pl.adapter import Adapter, AdapterConfig, disable_adapter, inject
from talklora_pl.adapter.io import adapter_metadata, state_tensors
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.allocation.rules import UniformAllocation
from talklora_pl.base import BaseModel, load_base, load_tokenizer, portable
from talklora_pl.callbacks.allocation import ExpertAllocation
from talklora_pl.distributed.checkpoint import refuse_differences
from talklora_pl.errors import UserError
from talklora_pl.evaluation import Evaluation, Scores, predictions, score_batch, table, write_json
from talklora_pl.optim import ParamGroup, grouped, try_optimizer
from talklora_pl.routing import RoutingCollector, RoutingRecord


class FineTuner(L.LightningModule):
    """Fine-tunes a frozen Hugging Face model through an adapter.

    Args:
        base: which pretrained model.
        adapter: which mixture of experts.
        optimizer: of the trained tensors.
        lr_scheduler: stepped every optimiser step.
        param_groups: other learning rates or weight decays for some tensors; the first that matches counts.
        gradient_checkpointing: recompute decoder layers in the backward pass (never reentrant).
        compile: compile the model with ``torch.compile``.
        evaluation: how answers are scored.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: AdapterConfig,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        param_groups: list[ParamGroup] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        evaluation: Evaluation = Evaluation(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter_config = adapter
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.param_groups = param_groups or []
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_model = compile
        self.evaluation = evaluation
        # experts by module name, decided by the callback before the adapter is built; None: as the adapter's rule says
        self.allocation: dict[str, int] | None = None
        self.model: Any = None
        # routing of the newest training micro-step, for callbacks
        self.routing: list[RoutingRecord] = []
        # checkpoints hold what is trained; on_load_checkpoint checks that all of it is there
        self.strict_loading = False
        self._fingerprint: str | None = None
        self._step_loss: Tensor | float = 0.0  # of the micro-batches so far of the optimiser step

    def configure_callbacks(self) -> list[L.Callback]:
        """Allocation needs a hook that runs before :meth:`configure_model`."""
        listed = any(isinstance(c, ExpertAllocation) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if listed else [ExpertAllocation()]

    # --- building

    def configure_model(self) -> None:
        """Load the base, freeze it and inject the adapter. Called again, it does nothing."""
        if self.model is not None:
            return
        self.adapter_config.validate()
        # a strategy that shards the base also reads it, each process its own part
        meta = self._trainer is not None and getattr(self.trainer.strategy, "loads_base", False)
        self.model = load_base(self.base, self.device, meta)
        self._inject(self.adapter_config, self.device)
        if self.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        if self.compile_model:
            self.model.compile()
        self.model.train()

    def check(self) -> None:
        """Build everything on the meta device, without weights, to find mistakes before any long work.

        Raises:
            UserError: about the base, the adapter's options or targets, the parameter groups, the optimiser or the
                schedule.
        """
        config, problems = self.adapter_config, list[str]()
        groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(1, 1))]}]  # if there will be no others

        def load() -> None:
            self.model = load_base(self.base, meta=True)

        def inject() -> None:
            nonlocal groups
            if self.model is not None:
                config.experts.site.find(self.model, config.targets, config.exclude, config.layers)
            if not problems:
                # a rule that reads weights has none to read here
                self._inject(replace(config, allocation=UniformAllocation()))
                groups = grouped(self.trained(), self.param_groups)

        for part in (config.validate, load, inject, lambda: try_optimizer(self.optimizer, self.lr_scheduler, groups)):
            try:
                part()
            except UserError as e:
                problems.append(str(e))
        self.model = None
        if problems:
            raise UserError("\n".join(problems))

    def _inject(self, config: AdapterConfig, device: torch.device | None = None) -> None:
        if self.base.task == "sequence_classification":
            # the head is new, so it is trained along: everything outside of the encoder that has parameters
            prefix = self.model.base_model_prefix
            heads = [n for n, m in self.model.named_children() if n != prefix and any(True for _ in m.parameters())]
            config = replace(config, modules_to_save=sorted({*config.modules_to_save, *heads}))
        inject(self.model, config, allocation=self.allocation, device=device)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return self.model.talklora["default"]

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained tensors by name, without the prefix that all of them have."""
        named = ((n.removeprefix("model.talklora.default."), p) for n, p in self.named_parameters() if p.requires_grad)
        return dict(named)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(grouped(self.trained(), self.param_groups))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:
            setattr(scheduler, "total_steps", int(self.trainer.estimated_stepping_batches))  # noqa: B010
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- training

    def on_fit_start(self) -> None:
        # while all processes are alive: the weights may be sharded
        self._fingerprint = self.adapter_metadata().base.fingerprint

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def token_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the positions whose next token carries loss.

        The vocabulary projection sees gathered, contiguous rows only: on a CPU a strided slice of bf16 rows is two
        orders of magnitude slower, and everywhere the rest of the (B,S,V) logits is not needed.

        Returns:
            logits_NV, the tokens to predict (N,), and the batch row of each (N,).
        """
        targets_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        keep_BS = targets_BS != -100
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][keep_BS].unsqueeze(0), *args[1:]))
        try:
            logits_1NV = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        finally:
            hook.remove()
        return logits_1NV.squeeze(0), targets_BS[keep_BS], keep_BS.nonzero()[:, 0]

    def summed_loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum of the task loss over what carries it, and how much that is: (scalar, tokens or rows)."""
        if self.base.task == "sequence_classification":
            logits_BC = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss_sum = F.cross_entropy(_at_least_float32(logits_BC), batch["labels"], reduction="sum")
            return loss_sum, len(batch["labels"])
        logits_NV, targets_N, _ = self.token_logits(batch)
        return F.cross_entropy(_at_least_float32(logits_NV), targets_N, reduction="sum"), len(targets_N)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Task loss over all tokens of the optimiser step, plus balance losses averaged over its micro-steps."""
        with RoutingCollector(self.model, batch["attention_mask"], batch.get("task_types")) as collector:
            loss_sum, tokens = self.summed_loss(batch)
        self.routing = collector.records
        self.adapter.count_loads(self.routing)
        # Lightning divides by the accumulation and DDP by the ranks: undo both, then divide by all tokens of the step
        accumulate = self.trainer.accumulate_grad_batches
        step_tokens = batch.get("step_tokens") or self._tokens_of_all_ranks(tokens) * accumulate
        task = loss_sum * (self.trainer.world_size * accumulate / step_tokens)
        self._step_loss += task.detach() / accumulate
        if not self.trainer.fit_loop._should_accumulate():
            # its mean over ranks is the mean over all tokens of the step, however they are spread
            self.log("train_loss", self._step_loss, prog_bar=True, sync_dist=True, batch_size=1)
            self._step_loss = 0.0
        return task + self.balance_loss() * (accumulate / batch.get("micro_steps", accumulate))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then routers that balance themselves; a checkpoint of this step is written after both."""
        super().optimizer_step(*args, **kwargs)
        self.adapter.after_optimizer_step()

    def balance_loss(self) -> Tensor:
        """Weighted sum of the balance losses of the newest micro-step, each logged by name."""
        records = [r for r in self.routing if r.routing.weights_TE.shape[1] > 1]
        total = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, enabled=False):  # sums over tokens need more than bf16's 8 bits
            for options in self.adapter.config.balance:
                value = self.adapter.balance[options.name](records)
                self.log(f"balance/{options.name}", value.detach(), batch_size=1)
                total = total + options.weight * value
        return total

    def _tokens_of_all_ranks(self, tokens: int) -> int:
        """For data modules that do not say how many tokens an optimiser step has."""
        if self.trainer.world_size == 1:
            return tokens
        return int(self.trainer.strategy.reduce(torch.tensor(tokens, device=self.device), reduce_op="sum"))

    def on_train_batch_end(self, *args: Any) -> None:
        self.routing = []

    # --- evaluation

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.base)

    @property
    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        eos_id = getattr(self._datamodule, "eos_id", None)
        return self.tokenizer.eos_token_id if eos_id is None else eos_id

    def on_validation_epoch_start(self) -> None:
        self.scores = Scores(self._tasks()).to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.scores.update(score_batch(self, batch), self._tasks(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.scores.compute())

    @property
    def _compare_base(self) -> bool:
        # a classifier's head is new: before it is trained, the base has no score
        return self.evaluation.compare_base and self.base.task != "sequence_classification"

    def on_test_epoch_start(self) -> None:
        self.scores = Scores(self._tasks()).to(self.device)
        self.base_scores = Scores(self._tasks()).to(self.device)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.scores.update(score_batch(self, batch, generate=True), self._tasks(batch))
        if self._compare_base:
            with disable_adapter(self.model):
                self.base_scores.update(score_batch(self, batch, generate=True), self._tasks(batch))

    def on_test_epoch_end(self) -> None:
        tuned, base = self.scores.compute(), self.base_scores.compute() if self._compare_base else None
        self._log_scores("test", tuned)
        path = self._output("test_scores.json")
        if self.trainer.is_global_zero:
            write_json(path, tuned, base)
            rich.print(table(tuned, base), f"Scores as JSON: {path}", sep="\n")

    def on_predict_epoch_start(self) -> None:
        self.predictions: list[dict[str, Any]] = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        records = predictions(score_batch(self, batch, generate=True), batch)
        self.predictions += records
        return records

    def on_predict_epoch_end(self) -> None:
        every = [self.predictions]
        if self.trainer.world_size > 1:
            every = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(every, self.predictions)
        path = self._output("predictions.jsonl")
        if self.trainer.is_global_zero:
            records = sorted((r for rank in every for r in rank), key=lambda r: r.pop("index"))
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
            rich.print(f"{len(records)} predictions: {path}")

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

    def adapter_metadata(self) -> AdapterMetadata:
        """What a checkpoint and an exported folder hold of the run's method."""
        base: dict[str, Any] = {
            "name_or_path": portable(self.base.path),
            "task": self.base.task,
            "num_labels": self.base.num_labels,
        }
        if self.base.revision is not None:
            base["revision"] = self.base.revision
        if self._fingerprint is not None:
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
        if self.trainer.state.fn != "fit" and (saved := checkpoint.get("talklora")):
            path = self.trainer.ckpt_path or ""
            metadata = AdapterMetadata.from_dict(saved, path)
            refuse_differences(metadata.method(), self.adapter_metadata().method(), path)
        have = checkpoint["state_dict"]
        for key, value in state_tensors(self.model).items():
            if f"model.{key}" not in have:
                raise UserError(f"The checkpoint lacks {key!r}; it was written by a run with another method or base.")
            if have[f"model.{key}"].shape != value.shape:
                got, want = list(have[f"model.{key}"].shape), list(value.shape)
                raise UserError(f"The checkpoint's {key!r} has shape {got}, this run needs {want}.")


def _at_least_float32(logits: Tensor) -> Tensor:
    """Losses are computed in float32 where the base computes in less."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
