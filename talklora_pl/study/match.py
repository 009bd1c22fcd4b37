"""Methods of equal size: the rank at which a method trains as many parameters as the baseline."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from talklora_pl.study.plan import Part, RunSpec, Study

MOST = 1024
"""Ranks of one expert that are tried."""


def matched(study: Study) -> Study:
    """The study with ranks as ``match`` asks for."""
    if study.match is None:
        return study
    first = study.data[0]
    baseline = next(m for m in study.methods if m.name == study.baseline)
    goal = _counter(study, first, baseline)(None)
    methods = [m if m is baseline else _match(study, first, m, goal) for m in study.methods]
    return replace(study, methods=tuple(methods))


def _match(study: Study, data: Part, method: Part, goal: int) -> Part:
    count = _counter(study, data, method)
    low, high = 1, MOST  # the number grows with the rank
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= goal else (low, middle)
    rank = min((low, high), key=lambda r: abs(count(r) - goal))
    print(
        f"{method.name}: expert_rank {rank} trains {count(rank):,} parameters, the baseline {goal:,}", file=sys.stderr
    )
    options = {**method.options, "model.adapter.rank": None, "model.adapter.expert_rank": rank}
    return replace(method, options=options)


def _counter(study: Study, data: Part, method: Part) -> Callable[[int | None], int]:
    """Number of trained parameters of a method by the rank of an expert; None: the rank it has."""
    from talklora_pl.cli.lightning import built

    spec: RunSpec = study.run(data, method, study.seeds[0], study.choices[0])
    tuner = built(list(spec.argv)).model
    config = tuner.adapter_config

    def count(rank: int | None) -> int:
        tuner.adapter_config = config if rank is None else replace(config, rank=None, expert_rank=rank)
        return tuner.count_trained()

    return count
