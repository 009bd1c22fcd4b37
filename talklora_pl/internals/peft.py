"""PEFT 0.21: its list of adapter types is closed, and how a type of adapter takes part is the private part of its
classes. Here it gets another type, and a parent for it that turns PEFT's private calls into a few public ones.

N name of an adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn


def add_type(name: str, config_class: type[PeftConfig], tuner: type[Tuner]) -> None:
    """Let PEFT know adapters of another type. Once; a second call does nothing.

    ``PeftType`` is an enumeration, which cannot be extended: the member is made as the enumeration makes its own.
    """
    word = name.upper()
    if word in PeftType.__members__:
        return
    member = str.__new__(PeftType, word)
    member._name_, member._value_ = word, word
    PeftType._member_map_[word] = member
    PeftType._member_names_.append(word)
    PeftType._value2member_map_[word] = member
    type.__setattr__(PeftType, word, member)
    register_peft_method(name=name, config_cls=config_class, model_cls=tuner, prefix=tuner.prefix)


class Status(nn.Module, BaseTunerLayer):
    """Stands for all adapted layers where PEFT asks its layers for their state."""

    adapter_layer_names = ("adapters",)

    def __init__(self, tuner: Tuner) -> None:
        super().__init__()
        self._tuner = (tuner,)  # in a tuple: it is no child
        self.merged_adapters: list[str] = []

    @property
    def adapters(self) -> nn.ModuleDict:
        """N -> its tensors, as a module."""
        return self._tuner[0].adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the model computes what the base does."""
        return self._tuner[0].active is None

    @property
    def active_adapter(self) -> Any:
        """N."""
        return self._tuner[0].active_adapter


class Tuner(BaseTuner):
    """A type of adapter for PEFT. Children say how one is put in, switched and taken out, and where its tensors are.

    Attributes:
        prefix: the child of the model in which all adapters are, with a full stop; in it each has its name.
    """

    prefix: str
    tuner_layer_cls = Status
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.status = Status(self)

    # --- for children

    @abstractmethod
    def put_in(self, name: str, config: Any) -> None:
        """Give ``self.model`` an adapter, leaving on what is on."""

    @abstractmethod
    def take_out(self, name: str) -> None:
        """Remove an adapter."""

    @property
    @abstractmethod
    def adapters(self) -> nn.ModuleDict:
        """All adapters by name."""

    @property
    @abstractmethod
    def active(self) -> str | None:
        """The adapter that is on."""

    @abstractmethod
    def switch_to(self, name: str | None) -> None:
        """Turn an adapter on, or all off."""

    @abstractmethod
    def rows(self, names: list[str]) -> AbstractContextManager[None]:
        """Inside of it every row of a batch has the adapter of its name; ``__base__`` means none."""

    # --- what PEFT calls

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self.put_in(adapter_name, config)
        first = len(self.peft_config) == 1
        self.set_requires_grad(adapter_name, first and not config.inference_mode)
        if first:
            self.switch_to(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        (name,) = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for other in self.adapters:
            self.set_requires_grad(other, other == name and not inference_mode)
        self.switch_to(name)
        self.active_adapter = name

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapters[name].requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        (name,) = self.active_adapters
        self.switch_to(name)

    def disable_adapter_layers(self) -> None:
        self.switch_to(None)

    def delete_adapter(self, adapter_name: str) -> None:
        self.take_out(adapter_name)
        del self.peft_config[adapter_name]
        self.active_adapter = self.active or []

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        """An option of the adapter says it."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """Only :meth:`inject_adapter` of the parent calls it."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
        else:
            with self.rows(names):
                yield

    # --- names of tensors: in a file without that of the adapter

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        return {k: v for k, v in state_dict.items() if f"{cls.prefix}{adapter_name}." in k}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"{cls.prefix}{adapter_name}.", cls.prefix, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        named = {k.replace(cls.prefix, f"{cls.prefix}{adapter_name}.", 1): v for k, v in state_dict.items()}
        cls.check_tensors({k: v for k, v in model.state_dict().items() if f"{cls.prefix}{adapter_name}." in k}, named)
        return named

    @classmethod
    @abstractmethod
    def check_tensors(cls, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Refuse tensors out of a file that are not those of the model; PEFT itself skips what does not fit."""
