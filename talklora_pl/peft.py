"""Adapters of this package in PEFT's own words: import it, and ``get_peft_model`` takes a :class:`TalkLoraConfig`.

    import talklora_pl.peft
    model = get_peft_model(model, talklora_pl.peft.TalkLoraConfig(method="talklora"))

``save_pretrained``, ``PeftModel.from_pretrained``, ``disable_adapter``, ``set_adapter`` and what is built on them, such
as TRL's trainers, work as for LoRA. Needs the extra ``peft``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

try:
    from peft import PeftConfig, PeftType
except ModuleNotFoundError as e:
    raise ImportError("talklora_pl.peft needs the package peft: pip install 'talklora-pl[peft]'.") from e
from torch import Tensor, nn

from talklora_pl.adapter.adapters import adapter_rows, adapter_set, remove_adapter
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.inject import inject
from talklora_pl.adapter.metadata import AdapterMetadata, BaseInfo
from talklora_pl.errors import UserError
from talklora_pl.export.merge import merge_adapter
from talklora_pl.internals.peft import Tuner, add_type
from talklora_pl.names import ADAPTERS
from talklora_pl.shipped import method


@dataclass
class TalkLoraConfig(PeftConfig):
    """A mixture of low-rank experts.

    Attributes:
        method: name of a method that comes with the package, as in ``--config method/NAME``.
        target_modules: ``targets`` of :class:`~talklora_pl.AdapterConfig`; None: the method's.
        options: further options of :class:`~talklora_pl.AdapterConfig` in place of the method's; a part is its name or
            a dict ``{name, option: value}``. Once the adapter is built these are all that it has.
        experts_per_layer, plain_layers: experts of every adapted module, once the adapter is built.
        modules_to_save: must be None.
    """

    method: str = "talklora"
    target_modules: list[str] | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    experts_per_layer: dict[str, int] | None = None
    plain_layers: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TALKLORA")

    def adapter_config(self) -> AdapterConfig:
        """The options of the adapter. Nothing that a file names is imported, and no pattern of it is run.

        Raises:
            UserError: an unknown method, option or component, or one that PEFT's folder has no place for.
        """
        if self.modules_to_save or self.options.get("modules_to_save"):
            raise UserError(
                "TalkLoraConfig: modules_to_save cannot be trained through PEFT; leave it out, or use "
                "talklora_pl.inject or `talklora_pl fit`, which have it."
            )
        if self.experts_per_layer is None:
            targets = {} if self.target_modules is None else {"targets": self.target_modules}
            return method(self.method, **targets, **self.options)
        return self.metadata().exact_config(self.metadata().config())

    def metadata(self) -> AdapterMetadata:
        """What the adapter's own folder would hold of the method."""
        return AdapterMetadata(BaseInfo(), self.options, self.experts_per_layer or {}, self.plain_layers)


class TalkLoraModel(Tuner):
    """Adapters of this package on one model, for PEFT."""

    prefix = f"{ADAPTERS}."

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("low_cpu_mem_usage"):
            raise UserError(
                "talklora_pl.peft: low_cpu_mem_usage is not for these adapters, which are small; leave it out."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def put_in(self, name: str, config: TalkLoraConfig) -> None:
        if not isinstance(config, TalkLoraConfig):
            raise UserError(f"{type(config).__name__} is none of talklora_pl; one PeftModel has adapters of one type.")
        options = config.adapter_config()
        there = getattr(self.model, ADAPTERS, None)
        on = None if there is None else there.switch.active
        adapter = inject(self.model, options, name, allocation=config.experts_per_layer)
        twin = next((n for n, c in self.peft_config.items() if c is config and n != name), None)
        if name == "ref" and twin is not None:
            # TRL adds a reference by the very config of the adapter that it copies, and then copies parameters, but not
            # the biases of routers that balance themselves, which are buffers
            adapter.load_state_dict(self.adapters[twin].state_dict())
        if on is not None:
            self.switch_to(on)
        if config.experts_per_layer is None:
            config.options = adapter.config.to_dict()
            config.plain_layers = list(adapter.plain_layers)
            config.experts_per_layer = {
                n: e for n, e in adapter.experts_per_layer.items() if n not in adapter.plain_layers
            }
            config.target_modules = config.options["targets"]

    def take_out(self, name: str) -> None:
        remove_adapter(self.model, name)

    @property
    def adapters(self) -> nn.ModuleDict:
        return adapter_set(self.model)

    @property
    def active(self) -> str | None:
        there = getattr(self.model, ADAPTERS, None)
        return None if there is None else there.switch.active

    def switch_to(self, name: str | None) -> None:
        adapter_set(self.model).switch.active = name

    def rows(self, names: list[str]) -> AbstractContextManager[None]:
        return adapter_rows(self.model, [None if name == "__base__" else name for name in names])

    def unload(self) -> nn.Module:
        """The base without any adapter."""
        for name in list(self.adapters):
            remove_adapter(self.model, name)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base with the active adapter in its weights.

        Raises:
            UserError: its router looks at the token, so there is no such base.
        """
        (name,) = self.active_adapters
        merge_adapter(self.model, name)
        return self.unload() if hasattr(self.model, ADAPTERS) else self.model

    @classmethod
    def check_tensors(cls, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        for key in sorted(own.keys() | given.keys()):
            if key not in given or key not in own:
                raise UserError(f"The adapter's file {'lacks' if key in own else 'has a foreign'} tensor {key!r}.")
            if own[key].shape != given[key].shape:
                got, want = list(given[key].shape), list(own[key].shape)
                raise UserError(f"The adapter's tensor {key!r} has shape {got}, and the model needs {want}.")


add_type("talklora", TalkLoraConfig, TalkLoraModel)
