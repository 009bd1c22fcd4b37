"""Random numbers as a function of the position in training: a resumed run draws what the uninterrupted one drew."""

import hashlib

import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Reseed torch's generators (CPU and every GPU) for one micro-batch.

    A checkpoint need not hold generator states then: dropout and routing noise depend on these three numbers alone.

    Args:
        seed: the run's seed (``seed_everything``).
        step: micro-batches since the beginning of training, over all epochs.
        rank: global rank; ranks draw different numbers.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
