"""``map`` in several processes, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from talklora_pl.errors import UserError

A = TypeVar("A")
B = TypeVar("B")

_work: Callable[[Any], Any]  # of a process of the pool


def processes(wanted: int | None) -> int:
    """How many to use: what the user wants, or as many as this process may use cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or min(8, cores)


def ordered(work: Callable[[A], B], items: Iterable[A], count: int) -> Iterator[B]:
    """``work`` of every item, in the order of the items, of which only a few are held at a time.

    Processes are forked, so that ``work`` may be anything: a tokenizer, a kind of rows of the user's own. One item
    alone is not worth them. Where forking is not safe (macOS, Windows), one process does it all.

    Raises:
        UserError: a process was killed.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if count == 1 or len(first) == 1 or sys.platform != "linux":
        yield from map(work, chain(first, items))
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque[Future[B]] = deque()
    try:
        for item in chain(first, items):
            waiting.append(pool.submit(_do, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        raise UserError(
            "data.num_proc: a process that prepares rows was killed (out of memory?). Fewer processes need less: "
            "data.num_proc: 1."
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed tells nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
