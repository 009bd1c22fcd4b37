"""Imported once by the server that test runs are forked from."""

import lightning.pytorch.cli
import tensorboard.compat
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama

import talklora_pl.lightning_cli  # noqa: F401
