"""Imported once by the server that test runs are forked from."""

import datasets  # noqa: F401
import lightning.pytorch.cli  # noqa: F401
import tensorboard.compat  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import talklora_pl.cli.lightning  # noqa: F401
