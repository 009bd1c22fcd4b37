"""Routing statistics summed over batches, micro-steps and ranks, and the metrics of load and of choice made of them.

T tokens, L layers, N tasks, E experts of the widest layer (narrower layers have zeros there), n experts of one layer,
K selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from talklora_pl.monitoring.host import to_host
from talklora_pl.ranks import every_rank, gather
from talklora_pl.routing import PackedRows, RoutingRecord

MAX_ELEMENTS = 2**22  # of the tensors made in one go
Read = Callable[[Sequence[Tensor]], list[Tensor]]


class RoutingLoad(Metric):
    """Sums over tokens from which :class:`Load` follows; pads are left out, all ranks are counted.

    Args:
        layers: number of experts of every routed layer, by name.
    """

    full_state_update = False
    weights: Tensor
    choices: Tensor
    tokens: Tensor
    entropy: Tensor
    margin: Tensor
    router_z: Tensor
    selected: Tensor

    def __init__(self, layers: Mapping[str, int]) -> None:
        super().__init__(dist_sync_fn=gather)
        self.layers = dict(layers)
        self.rows = {name: i for i, name in enumerate(layers)}
        self.tasks = [""]  # rows without a task go to the first
        L, E = len(layers), max(layers.values(), default=0)
        self.add_state("weights", torch.zeros(L, 1, E), "sum")  # of w per layer, task and expert
        self.add_state("choices", torch.zeros(L, 1, E), "sum")  # selections; dense: first choices
        self.add_state("tokens", torch.zeros(L, 1), "sum")
        self.add_state("entropy", torch.zeros(L), "sum")
        self.add_state("margin", torch.zeros(L), "sum")
        self.add_state("router_z", torch.zeros(L), "sum")
        self.add_state("selected", torch.zeros(L), "max")  # K, 0 for dense routers

    @torch.no_grad()
    def update(
        self, records: Iterable[RoutingRecord], tasks: Sequence[str] | None = None, filler: bool = False
    ) -> None:
        """Count one forward pass.

        Args:
            records: its routing.
            tasks: task of every row (sequence) of the batch, if the data has tasks.
            filler: the batch is there for the other ranks' sake only; counts nothing.
        """
        if filler:
            return
        task_B = self._numbers([self._task(t) for t in tasks]) if tasks else None
        for group in self._groups(records):
            self._add(group, task_B)

    def _groups(self, records: Iterable[RoutingRecord]) -> Iterator[list[RoutingRecord]]:
        """Layers of equal shapes together, so that a model costs a few operations and not a few per layer."""
        groups: dict[tuple[int, ...], list[RoutingRecord]] = {}
        for r in records:
            if r.layer in self.rows:
                chosen = r.routing.selected_TK
                key = (*r.routing.weights_TE.shape, 0 if chosen is None else chosen.shape[1])
                groups.setdefault(key, []).append(r)
        for (T, E, _), group in groups.items():
            step = max(1, MAX_ELEMENTS // (T * E))
            yield from (group[i : i + step] for i in range(0, len(group), step))

    def _add(self, group: list[RoutingRecord], task_B: Tensor | None) -> None:
        routings = [r.routing for r in group]
        row_L = self._numbers([self.rows[r.layer] for r in group])
        pad_LT = ~torch.stack([r.mask_T for r in group])
        w_LTE = torch.stack([r.weights_TE for r in routings]).float()
        p_LTE = torch.stack([r.probs_TE for r in routings]).float()
        logits_LTE = torch.stack([r.logits_TE for r in routings]).float()
        E = w_LTE.shape[-1]
        if routings[0].selected_TK is None:
            K, chosen_LTK = 0, p_LTE.argmax(-1, keepdim=True)
        else:
            chosen_LTK = torch.stack([r.selected_TK for r in routings if r.selected_TK is not None])
            K = chosen_LTK.shape[-1]
        chosen_LTE = torch.zeros_like(w_LTE).scatter_(-1, chosen_LTK, 1.0)

        task_TN = self._tasks_of_tokens(w_LTE.shape[1], task_B, group[0].packed)
        pad_LT1 = pad_LT.unsqueeze(-1)
        # (N,T) @ (L,T,E)
        self.weights[..., :E].index_add_(0, row_L, task_TN.t() @ w_LTE.masked_fill(pad_LT1, 0))
        self.choices[..., :E].index_add_(0, row_L, task_TN.t() @ chosen_LTE.masked_fill_(pad_LT1, 0))
        self.tokens.index_add_(0, row_L, (~pad_LT).float() @ task_TN)

        p_LTE = p_LTE / p_LTE.sum(-1, keepdim=True)
        entropy_LT = -torch.xlogy(p_LTE, p_LTE).sum(-1) / math.log(E)
        best_LT2 = p_LTE.topk(2, dim=-1).values
        for state, value_LT in (
            (self.entropy, entropy_LT),
            (self.margin, best_LT2[..., 0] - best_LT2[..., 1]),
            (self.router_z, logits_LTE.logsumexp(-1).square()),
        ):
            state.index_add_(0, row_L, value_LT.masked_fill(pad_LT, 0).sum(-1))
        self.selected[row_L] = float(K)

    def _numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values).to(self.tokens.device, non_blocking=True)  # else the host would wait

    def _task(self, name: str) -> int:
        if name not in self.tasks:
            self._set_tasks([*self.tasks, name])
        return self.tasks.index(name)

    def _set_tasks(self, names: list[str]) -> None:
        """Rearrange the sums for another list of tasks, which has all of the present ones."""
        place = self._numbers([names.index(t) for t in self.tasks])
        for key in ("weights", "choices", "tokens"):
            old = getattr(self, key)
            new = old.new_zeros(old.shape[0], len(names), *old.shape[2:])
            setattr(self, key, new.index_copy_(1, place, old))
        self.tasks = names

    def _tasks_of_tokens(self, T: int, task_B: Tensor | None, packed: PackedRows | None) -> Tensor:
        """One-hot (T,N). A layer that sees neither all tokens nor one row per sequence has its tokens at no task."""
        task_T = torch.zeros(T, dtype=torch.long, device=self.tokens.device)
        if task_B is not None and packed is not None:
            task_T = task_B[packed.row_T]
        elif task_B is not None and T % len(task_B) == 0:
            task_T = task_B.repeat_interleave(T // len(task_B))
        return (task_T.unsqueeze(-1) == torch.arange(len(self.tasks), device=task_T.device)).float()

    def compute(self, read: Read = to_host) -> Load:
        """The load of everything counted, over all ranks.

        Args:
            read: how the sums come to the host, all at once.
        """
        return Load(self, read)

    def summary(self, read: Read = to_host) -> Load:
        """As :meth:`compute`, after the ranks have agreed on the names of the tasks. Every rank must call it."""
        known = every_rank(self.tasks)
        if len(known) > 1:
            self._set_tasks(["", *sorted({t for tasks in known for t in tasks} - {""})])
        load: Load = self.compute(read)
        return load

    def reset(self) -> None:
        super().reset()
        self.tasks = [""]


class Load:
    """Who carries how much. Per layer with n experts and shares p of its load (sum 1):

    ====================  =====================================================================================
    relative load         n p_i; 1 is ideal
    cv                    coefficient of variation: standard deviation of n p_i over experts (mean 1)
    effective_experts     exp(H(p)) = exp(-sum_i p_i log p_i): as many experts, evenly loaded, have the entropy
    dead_experts          share of experts with n p_i below ``dead_below``
    max_vio               max_i n p_i - 1 (arXiv 2408.15664, section 4.1)
    token_entropy         mean over tokens of H(routing probabilities) / log n: 0 decided, 1 undecided
    margin                mean over tokens of the largest minus the second largest probability
    router_z              mean over tokens of logsumexp(logits)^2 (arXiv 2202.08906, equation 5)
    ====================  =====================================================================================

    The load of a dense router is the mean weight, that of a router that selects its share of all selections.

    Attributes:
        layers: names of the layers that have seen tokens.
        tasks: names of the tasks; "" is data without one.
        experts_L, selected_L: n and K of every layer (K = 0: dense).
        share_LE, task_share_LNE: p, over all tokens and over those of each task (0 where it had none).
        tokens_N: tokens of every task.
    """

    def __init__(self, sums: RoutingLoad, read: Read = to_host) -> None:
        states = [sums.tokens, sums.weights, sums.choices, sums.selected, sums.entropy, sums.margin, sums.router_z]
        states = read(states)
        seen_L = states[0].sum(-1) > 0
        self.layers = [name for name, i in sums.rows.items() if seen_L[i]]
        self.experts_L = torch.tensor([sums.layers[name] for name in self.layers])
        tokens_LN, weights_LNE, choices_LNE, selected_L, *per_token = (state.double()[seen_L] for state in states)
        self.selected_L = selected_L.long()
        keep_N = [i for i, name in enumerate(sums.tasks) if name or tokens_LN[:, i].any()]
        self.tasks = [sums.tasks[i] for i in keep_N]
        self.tokens_N = tokens_LN.amax(0)[keep_N].long() if self.layers else torch.zeros(0).long()
        load_LNE = torch.where((self.selected_L > 0)[:, None, None], choices_LNE, weights_LNE)
        self.task_share_LNE = _normalise(load_LNE[:, keep_N])
        self.share_LE = _normalise(load_LNE.sum(1))
        tokens_L = tokens_LN.sum(1)
        self.token_entropy, self.margin, self.router_z = (sum_L / tokens_L for sum_L in per_token)

    @property
    def relative_LE(self) -> Tensor:
        """n p, 0 beyond the experts of a layer."""
        return self.share_LE * self.experts_L.unsqueeze(-1)

    @property
    def token_share_LE(self) -> Tensor:
        """Dense: p. Else: share of the tokens that select the expert, K p."""
        return self.share_LE * self.selected_L.clamp(min=1).unsqueeze(-1)

    def per_layer(self, dead_below: float = 0.01) -> dict[str, Tensor]:
        """Every metric, (L,)."""
        r_LE, n_L = self.relative_LE, self.experts_L.double()
        real_LE = torch.arange(r_LE.shape[-1]) < self.experts_L.unsqueeze(-1)
        return {
            "cv": ((r_LE - 1).square().where(real_LE, 0.0).sum(-1) / n_L).sqrt(),
            "effective_experts": torch.exp(-torch.xlogy(self.share_LE, self.share_LE).sum(-1)),
            "dead_experts": ((r_LE < dead_below) & real_LE).sum(-1) / n_L,
            "max_vio": r_LE.amax(-1) - 1,
            "token_entropy": self.token_entropy,
            "margin": self.margin,
            "router_z": self.router_z,
        }

    def aggregates(self, dead_below: float = 0.01) -> dict[str, float]:
        """Mean of every metric over layers, and the worst layer's MaxVio."""
        per_layer = self.per_layer(dead_below)
        means = {key: value.mean().item() for key, value in per_layer.items()}
        return means | {"max_vio_worst": per_layer["max_vio"].max().item()}

    def task_distance_LN(self) -> Tensor:
        """Total variation 1/2 sum_i |p_i(task) - p_i| between a task's load and the layer's: 0 same, 1 disjoint."""
        return (self.task_share_LNE - self.share_LE.unsqueeze(1)).abs().sum(-1) / 2


def _normalise(load: Tensor) -> Tensor:
    return load / load.sum(-1, keepdim=True).clamp(min=1e-12)


def top_experts(record: RoutingRecord) -> Tensor:
    """Selected experts of every real token, (T,K); the best one of a dense router, (T,1)."""
    chosen_TK = record.routing.selected_TK
    if chosen_TK is None:
        chosen_TK = record.routing.probs_TE.argmax(-1, keepdim=True)
    return chosen_TK[record.mask_T].to("cpu", torch.int16)


def overlap(before_TK: Tensor, after_TK: Tensor) -> float:
    """Mean over tokens of |before ∩ after| / K; 1 minus it is the routing churn."""
    same_TKK = before_TK.unsqueeze(-1) == after_TK.unsqueeze(-2)
    return same_TKK.any(-1).double().mean().item()
