"""Say who is missing when a collective fails."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import astuple, dataclass

import lightning as L
import torch.distributed as dist

from talklora_pl.durable import alive
from talklora_pl.ranks import every_rank

# what gloo, NCCL and the store say of a peer that does not answer or is gone
LOST = re.compile(
    r"timed? ?out|timeout|connection (closed|reset|refused)|broken pipe|no route|gloo|nccl", re.IGNORECASE
)


@dataclass(frozen=True)
class Peer:
    """One process of the run."""

    rank: int
    host: str
    address: str
    pid: int

    @classmethod
    def here(cls) -> Peer:
        """This process, with the address that leads to the master."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
                address = probe.getsockname()[0]
            except OSError:
                address = "?"
        return cls(dist.get_rank(), socket.gethostname(), address, os.getpid())

    def trouble(self, me: Peer) -> str | None:
        """What is wrong with this peer as seen from `me`, or None if it seems to be alive."""
        if self.address in (me.address, "?"):
            return None if alive(self.pid) else "its process is gone"
        try:
            socket.create_connection((self.address, 9), timeout=2).close()
        except ConnectionRefusedError:
            return None  # the machine answers
        except OSError as e:
            return f"its machine does not answer ({e})"
        return None


class Peers(L.Callback):
    """Adds to the error of a failed collective which ranks are unreachable, and what to do.

    How long a collective waits for a peer that does not answer is the strategy's ``timeout`` (30 minutes by default);
    a peer whose process died is noticed within seconds.
    """

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 and dist.is_initialized():
            self.peers = [Peer(*found) for found in every_rank(astuple(Peer.here()))]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not self.peers or not isinstance(exception, RuntimeError) or not LOST.search(str(exception)):
            return
        me = self.peers[trainer.global_rank]
        others = [(p, p.trouble(me)) for p in self.peers if p != me]
        lost = [f"rank {p.rank} on {p.host} ({p.address}): {what}" for p, what in others if what]
        if not lost:
            lost = [f"one of the ranks {', '.join(str(p.rank) for p, _ in others)}, whose machines all answer"]
        exception.args = (
            f"Lost contact with {'; '.join(lost)}. All processes of the run end; resume with --ckpt_path last. "
            f"(rank {me.rank} on {me.host}, step {trainer.global_step}: {exception})",
        )
