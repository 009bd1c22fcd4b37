"""Signals that end a run, as far as they are the same before and after Lightning is imported. Free of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 143
"""What a shell reports for a process that SIGTERM ended: schedulers take it for "asked to stop", not for a failure."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

requeues = True
"""Whether SIGUSR1 before the first step also requeues the SLURM job, from its first process."""

at_once: list[Callable[[], object]] = []
"""What is left to do when a signal ends the process before the first step."""

waiting = False
"""Whether there is nothing to keep yet."""

GRACE = 2.0
"""Seconds until a signal counts as one that no handler has seen."""


def _not_in_a_child() -> None:
    with suppress(ValueError):  # forked from another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_not_in_a_child)


def exit_code(number: int) -> int:
    """The status of a process that a signal stopped: 130 after Ctrl-C, as shells expect, or 143."""
    return 130 if number == signal.SIGINT else EXIT_CODE


def slurm_job() -> str | None:
    """Id of the SLURM job this process runs in, as ``scontrol requeue`` wants it."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(number: int) -> None:
    """Put the SLURM job back into the queue, if there is one and SIGUSR1 announced its time limit."""
    if number == signal.SIGUSR1 and (job := slurm_job()):
        subprocess.run(["scontrol", "requeue", job], check=False)


@contextmanager
def nothing_to_keep(early: Sequence[int] = ()) -> Iterator[None]:
    """While imports, the base and the data take their time: a signal ends the process, without a traceback.

    Args:
        early: signals that it got before; the first one ends it at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global waiting
    process, ends = os.getpid(), threading.Lock()

    def end(number: int, frame: FrameType | None) -> None:
        if not ends.acquire(blocking=False):
            return  # it is ending
        if os.getpid() == process:  # and no process that was forked from it
            for act in at_once:
                act()
            if requeues and os.environ.get("SLURM_PROCID", "0") == "0":
                requeue(number)
            print(f"\n{signal.Signals(number).name} before the first step: there is nothing to keep.", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code(number))

    def watch() -> None:
        while number := os.read(heard, 1):
            time.sleep(GRACE)
            if number[0] in SIGNALS and waiting:
                end(number[0], None)

    waiting = True
    before = {number: signal.signal(number, end) for number in SIGNALS}
    for number in early:
        end(number, None)
    # Python runs handlers between two of its own instructions: not while a process waits in a library for the others to
    # come, which have ended already. What came is written to this pipe at once.
    heard, said = os.pipe()
    os.set_blocking(said, False)
    others = signal.set_wakeup_fd(said, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        waiting = False
        signal.set_wakeup_fd(others)
        os.close(said)
        for number, handler in before.items():
            signal.signal(number, handler)
