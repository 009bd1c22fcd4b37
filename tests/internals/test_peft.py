"""What PEFT does beside its documented interface, and that it still asks a type of adapters in the same words."""

from __future__ import annotations

import inspect

import pytest

peft = pytest.importorskip("peft")

from peft import peft_model  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.utils import save_and_load  # noqa: E402

import talklora_pl.peft as bridge  # noqa: E402
from talklora_pl.internals import peft as internals  # noqa: E402


def test_the_type_is_a_member_as_any() -> None:
    member = peft.PeftType("TALKLORA")
    assert member is peft.PeftType["TALKLORA"] is peft.PeftType.TALKLORA and member in list(peft.PeftType)
    assert f"{member.value}" == "TALKLORA" == member and isinstance(member, str)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is bridge.TalkLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["TALKLORA"] is bridge.TalkLoraModel
    before = len(peft.PeftType)
    internals.add_type("talklora", bridge.TalkLoraConfig, bridge.TalkLoraModel)
    assert len(peft.PeftType) == before
    assert peft.PeftType("LORA") is peft.PeftType.LORA


@pytest.mark.parametrize("name", [n for n in vars(internals.Tuner) if hasattr(BaseTuner, n) and not n.startswith("__")])
def test_what_is_replaced_is_there(name: str) -> None:
    """A method that PEFT no longer has would never be called."""
    if name in ("prefix", "tuner_layer_cls", "target_module_mapping") or name.startswith("_abc"):
        return
    theirs, ours = (inspect.signature(getattr(c, name)) for c in (BaseTuner, internals.Tuner))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in ours.parameters.values())
    assert takes_any or set(theirs.parameters) <= set(ours.parameters), f"{name}: {theirs} became {ours}"


def test_peft_calls_what_is_replaced() -> None:
    """The places from which the hooks are called."""
    calls = {
        save_and_load: (
            "_get_adapter_state_dict",
            "_remove_adapter_name_from_key",
            "_remap_adapter_state_dict_for_load",
        ),
        peft_model: ("_enable_peft_forward_hooks", "inject_adapter", "set_adapter", "delete_adapter"),
        BaseTuner: ("inject_adapter",),
        internals.BaseTunerLayer: ("disable_adapters", "active_adapters"),
    }
    for place, names in calls.items():
        source = inspect.getsource(place)
        assert all(name in source for name in names), place
    for name in ("enable_adapter_layers", "disable_adapter_layers", "get_model_status"):
        assert f"{name}()" in inspect.getsource(peft_model.PeftModel.disable_adapter)
    assert isinstance(BaseTunerLayer.active_adapters, property)
