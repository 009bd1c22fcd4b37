import signal
import sys

early: list[int] = []
"""Signals that came before the command line could act on them: SLURM says once that the time is over."""

if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: early.append(number))
    from talklora_pl.cli import main

    sys.exit(main(early=early))
