"""Training steps of a small model, recorded as CUDA graphs and replayed.

A GPU is often done with 135M parameters before its host has asked for the next operator. A graph asks for all operators
of a forward and backward pass at once. It does what was recorded: the same operators, on the same memory, with the same
numbers in their places. So

* batches get shapes that many of them share (:func:`~talklora_pl.inputs.filled`), and there is a graph for each shape;
* the loss and the gradients are made in the graph, and autograd takes them from there: optimisers, clipping, DDP,
  accumulation and callbacks see what they see otherwise;
* a step is computed as it is, and not replayed, while anything is otherwise that a graph would not notice: a number of
  a module (an annealed temperature), the place of a tensor, a hook.

The plain way is ``compute`` itself. A graph is used when it has given the gradients of the plain way once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from talklora_pl.base.description import context_length
from talklora_pl.errors import UserError, in_a_line
from talklora_pl.inputs import filled
from talklora_pl.internals.torch import ReadFromOutside, version
from talklora_pl.names import ADAPTERS
from talklora_pl.same_gradients import difference

Compute = Callable[[dict[str, Any]], tuple[Tensor, Any]]
Record = Callable[[Callable[[], Any]], Callable[[], None]]

KIND = "cuda"  # of a device
MOST = 8  # graphs; each keeps its gradients and what else the step gives
PLAIN = 2  # of a shape that does not return often nothing need be recorded
CHANGES = 3  # so often all is recorded anew


class CapturedSteps:
    """The steps of one model: recorded where a shape returns, else computed as they are.

    Args:
        model: with what is trained in it.
        compute: from a batch to its loss and whatever else is wanted of the step, both a function of the batch's
            tensors and ``numbers`` alone, the latter without a gradient.
        say: told once why steps are not recorded.
        record: runs a function and gives what runs its operators again, on the same memory.
        plain: steps of a shape that are computed as they are before it is recorded.

    Attributes:
        turn: number of the replay whose gradients are there.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Compute,
        say: Callable[[str], None],
        record: Record | None = None,
        plain: int = PLAIN,
    ) -> None:
        self.compute, self.say = compute, say
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())  # of the base
        self._longest = context_length(getattr(model, "config"))  # noqa: B009 (of a Hugging Face model)
        self.record, self.plain = record or cuda_graphs(), plain
        self.watched = _Watched(model)
        self.trained = self.watched.trained()
        self._state: list[Any] = []
        self.turn, self._changes, self._why_not = 0, 0, ""
        self._told_of_hook = False
        self._met: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, batch: Mapping[str, Any], numbers: Mapping[str, float]) -> tuple[Tensor, Any]:
        """Loss of a step, and what else there is to it; the latter is there until the next step.

        Args:
            batch: of rows with an index of their labels.
            numbers: what else the step depends on; ``compute`` finds them in its batch, as tensors without dimensions.
        """
        found = None if self._why_not or self._is_hooked() else self._graph(batch, numbers)
        if found is None:
            return self.compute({**batch, **numbers})
        graph, given = found
        self.turn += 1
        graph.run(given, numbers)
        return _Replayed.apply(self, graph, *self.trained), graph.rest

    def _graph(self, batch: Mapping[str, Any], numbers: Mapping[str, float]) -> tuple[_Graph, dict[str, Any]] | None:
        given = filled(batch, self._longest)
        key = tuple((n, (*v.shape, v.dtype) if isinstance(v, Tensor) else v) for n, v in sorted(given.items()))
        if (state := self.watched.state()) != self._state:
            self._changes += bool(self._graphs)
            self._state, self._graphs = state, {}
            self.trained = self.watched.trained()
            if self._changes > CHANGES:
                self._give_up("numbers or tensors of the model change again and again")
                return None
        if key not in self._graphs:
            self._met[key] += 1
            if self._met[key] <= self.plain or len(self._graphs) == MOST:
                return None
            try:
                self._graphs[key] = self._recorded(given, numbers)
            except Exception as e:  # what cannot be recorded says so in ways of its own
                while isinstance(e.__context__, Exception):  # of which the end of the recording says less
                    e = e.__context__
                self._give_up(in_a_line(e))
                return None
        return self._graphs[key], given

    def _recorded(self, given: dict[str, Any], numbers: Mapping[str, float]) -> _Graph:
        """Raises: UserError: it gives other gradients; any error of recording."""
        before = [(b, b.clone(), version(b)) for b in self.watched.buffers]
        graph = _Graph(self, given, numbers)
        try:
            with torch.random.fork_rng([p.device for p in self.trained if p.is_cuda][:1]):
                graph.run_once()  # what is made at a first call is made, and not recorded
                with torch.compiler.set_stance("force_eager"), ReadFromOutside() as read:
                    graph.run_once()
                graph.memory = list(read.memory.values())
                graph.written = [b for b, _, at in before if version(b) != at]
                graph.replay = self.record(graph.run_once)

            def plain() -> Sequence[Tensor | None]:
                loss, _ = self.compute({**given, **numbers})  # of this shape, which draws the same random numbers
                return torch.autograd.grad(loss, self.trained, allow_unused=True)

            def fast() -> Sequence[Tensor | None]:
                graph.run(given, numbers)
                return graph.gradients

            if reason := difference(self.trained, plain, fast, self._dtype):
                raise UserError(reason)
        finally:
            with torch.no_grad():
                for b, copy, at in before:
                    if version(b) != at:
                        b.copy_(copy)
        return graph

    def _give_up(self, reason: str) -> None:
        self._why_not, self._graphs = reason, {}
        self.say(f"steps are not recorded: {reason}.")

    def _is_hooked(self) -> bool:
        if not (name := self.watched.hooked()):
            return False
        if not self._told_of_hook:
            self.say(f"steps are computed as they are while {name} has a hook, which a recorded step would not call.")
        self._told_of_hook = True
        return True


class _Graph:
    """One recorded step: the tensors that it reads, and those that it leaves its results in."""

    def __init__(self, steps: CapturedSteps, batch: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        device = batch["input_ids"].device
        self.steps = steps
        self.given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}
        self.given |= {n: torch.full((), v, dtype=torch.float64, device=device) for n, v in numbers.items()}
        self.written: list[Tensor] = []  # buffers
        self.memory: list[Any] = []  # that is read: it stays, whoever forgets what lies there
        self.replay: Callable[[], None] = lambda: None

    def run_once(self) -> None:
        """The step itself, computed on the tensors that it reads."""
        kind = self.given["input_ids"].device.type
        # casts that autocast keeps would be those of the weights as they are now
        with (
            torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False),
            self.steps.watched.leaves(self.steps.trained) as trained,
        ):
            loss, self.rest = self.steps.compute(self.given)
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        self.loss, self.gradients = loss.detach(), gradients

    def run(self, batch: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        """The step with another batch of this shape."""
        for name, value in self.given.items():
            if name in numbers:
                value.fill_(numbers[name])
            elif isinstance(value, Tensor):
                value.copy_(batch[name])
        self.replay()
        increment_version(self.written)


class _Replayed(torch.autograd.Function):
    """The loss of a step that has run, with its gradients."""

    @staticmethod
    def forward(ctx: Any, steps: CapturedSteps, graph: _Graph, *trained: Tensor) -> Tensor:
        ctx.steps, ctx.graph, ctx.turn = steps, graph, steps.turn
        return graph.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.steps.turn:
            raise RuntimeError("Another step has been replayed since, and the gradients are those of that one.")
        there = iter(torch._foreach_mul([g for g in ctx.graph.gradients if g is not None], d))
        return None, None, *(None if g is None else next(there) for g in ctx.graph.gradients)


class _Watched:
    """What of a model a graph takes as it was."""

    def __init__(self, model: nn.Module) -> None:
        adapters: Any = getattr(model, ADAPTERS, nn.Module())
        self._model = model
        self._tensors = [(place, n) for m in model.modules() for place in (m._parameters, m._buffers) for n in place]
        self._numbers = [
            (owner, name)
            for m in adapters.modules()
            for owner in _owners(m)
            for name, value in owner.items()
            if isinstance(value, bool | int | float | str) and name not in _OF_EVERY_MODULE
        ]
        self._numbers += [(vars(m), "training") for m in model.modules()]
        self._switch = getattr(adapters, "switch", None)
        self._own_hooks = {hook.id for hook in getattr(adapters, "hooks", ())}
        self._hooks = [
            (name or type(model).__name__, hooks)
            for name, m in model.named_modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.buffers: list[Tensor] = list(adapters.buffers())

    def trained(self) -> list[nn.Parameter]:
        """What is trained now; a callback may freeze or free parameters amid a run."""
        return [p for p in self._model.parameters() if p.requires_grad]

    @contextmanager
    def leaves(self, trained: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Inside, the model has other parameters on the memory of the trained ones: these, in their order.

        To a parameter belongs a node of autograd as long as anybody holds a graph with it, as DDP does, and that node
        waits for the stream of its first use. A step that is being recorded may wait for no other than its own.
        """
        own = {id(p): nn.Parameter(p.detach()) for p in trained}
        places: list[tuple[Any, str, Any]] = [(*at, p) for at in self._tensors if id(p := at[0].get(at[1])) in own]
        for place, name, p in places:
            place[name] = own[id(p)]
        try:
            yield list(own.values())
        finally:
            for place, name, p in places:
                place[name] = p

    def state(self) -> list[Any]:
        """Equal as long as a graph reads the right memory and computes with the right numbers."""
        tensors = (place.get(name) for place, name in self._tensors)
        return [
            self._switch and self._switch.active,  # the adapter that is on
            *(None if t is None else (t.data_ptr(), t.requires_grad) for t in tensors),
            *(place.get(name) for place, name in self._numbers),
        ]

    def hooked(self) -> str:
        """A module with a hook that is not one of the adapters', if there is one."""
        return next((name for name, hooks in self._hooks if hooks and hooks.keys() - self._own_hooks), "")


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _owners(of: Any) -> Iterator[dict[str, Any]]:
    """Where the numbers of a module and of its options are."""
    yield vars(of)
    for value in vars(of).values():
        for each in value if isinstance(value, list) else (value,):
            if is_dataclass(type(each)):
                yield from _owners(each)


def cuda_graphs() -> Record:
    """Records what runs on a GPU. All graphs share their memory: what one leaves is gone when the next runs."""
    pool: list[Any] = []

    def record(run: Callable[[], Any]) -> Callable[[], None]:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()  # a recording that fails leaves PyTorch in disorder, so what waits is found before it
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as those that load data, may go on
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool[0], capture_error_mode="thread_local"),
            ):
                run()
        except Exception:
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())  # that one still believes to be recorded
            raise
        return graph.replay

    return record
