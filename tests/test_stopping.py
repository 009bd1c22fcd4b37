"""A signal while a library waits, where Python runs no handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WAITS = """
import ctypes, sys
from talklora_pl import stopping
with stopping.nothing_to_keep():
    print("here", flush=True)
    semaphore = (ctypes.c_char * 64)()
    wait = ctypes.CDLL(None)
    wait.sem_init(semaphore, 0, 0)
    while True:
        wait.sem_wait(semaphore)
"""
FORKS = """
import os, signal, time
from talklora_pl import stopping
stopping.GRACE = 0.1
with stopping.nothing_to_keep():
    if (child := os.fork()) == 0:
        time.sleep(30)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(0.5)
    print("alive")
"""


def test_a_process_that_waits_in_a_library_ends_too(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen([sys.executable, "-c", WAITS], env=os.environ | slurm, stdout=subprocess.PIPE)
    assert job.stdout is not None and job.stdout.readline() == b"here\n"
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 143 and (tmp_path / "called").read_text() == "requeue 7\n"
    job.stdout.close()


def test_a_signal_to_a_forked_process_is_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["143", "alive"], done
