"""Sharded training: settings that the configuration files of accelerate can't contain, and sharded checkpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainingArguments


def reduce_in_float32(args: TrainingArguments) -> None:
    """Let the processes of `accelerate launch` with FSDP2 add up gradients in float32, as the original does.

    By default, accelerate adds them up in the type of the arithmetic.

    Args:
        args: Arguments to change. Without bfloat16 or FSDP2, they stay as they are.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2"
    if args.bf16 and launched:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        args.fsdp_plugin_args = {"mixed_precision_policy": policy}  # accelerate takes the rest from its configuration


@contextmanager
def in_its_own_class(model: nn.Module) -> Iterator[None]:
    """Give a sharded model its own class while it is saved, since `fully_shard` has replaced the class.

    Checkpoints contain the name and the source of the model's class.
    """
    current = type(model)
    model.__class__ = next(one for one in current.__mro__ if not issubclass(one, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = current


def check_sharding(checkpoint: str, shards: bool) -> None:
    """Check that a checkpoint can be resumed.

    Args:
        checkpoint: Folder of the checkpoint.
        shards: Whether the processes shard the model (FSDP2 or HSDP).

    Raises:
        ValueError: The checkpoint is sharded and the run is not, or the other way round.
    """
    is_sharded = next(Path(checkpoint).glob(f"{FSDP_MODEL_NAME}*"), None) is not None
    if is_sharded and not shards:
        raise ValueError(
            f"{checkpoint} is sharded. Resume it with `accelerate launch` and fsdp2.yaml or hsdp.yaml; on one GPU, "
            "with fsdp2.yaml and --num_processes 1."
        )
    if shards and not is_sharded:
        raise ValueError(
            f"{checkpoint} was saved by a run that does not shard the model. Resume it with the configuration of that "
            "run."
        )


__all__ = ["check_sharding", "in_its_own_class", "reduce_in_float32"]
