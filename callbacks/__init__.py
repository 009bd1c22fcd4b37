"""Lightning callbacks; imported as ``talklora_pl.callbacks``."""

from talklora_pl.callbacks.adapter_export import AdapterExport
from talklora_pl.callbacks.allocation import ExpertAllocation
from talklora_pl.callbacks.checkpoint import Checkpoint
from talklora_pl.callbacks.guard import FiniteGuard
from talklora_pl.callbacks.load_balance import LoadBalance
from talklora_pl.callbacks.others import OtherCallbacks
from talklora_pl.callbacks.peers import Peers
from talklora_pl.callbacks.preemption import Preemption
from talklora_pl.callbacks.resume import ExactResume
from talklora_pl.callbacks.routing_sensitivity import RoutingSensitivity
from talklora_pl.callbacks.run_metrics import RunMetrics
from talklora_pl.callbacks.sample_outputs import SampleOutputs

__all__ = [
    "AdapterExport",
    "Checkpoint",
    "ExactResume",
    "ExpertAllocation",
    "FiniteGuard",
    "LoadBalance",
    "OtherCallbacks",
    "Peers",
    "Preemption",
    "RoutingSensitivity",
    "RunMetrics",
    "SampleOutputs",
]
