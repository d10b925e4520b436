"""Settings of FSDP2 that do not come from its configuration files. `test_distributed.py` trains with FSDP2."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from openvla_hf.training.recipes import recipe
from openvla_hf.training.sharding import check_sharding, reduce_in_float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_added_up_in_float32(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    args = recipe("full", dtype=dtype).training_arguments(str(tmp_path))
    reduce_in_float32(args)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args or {})
    if args.bf16:
        plugin.set_mixed_precision("bf16")  # as accelerate does
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert plugin.mixed_precision_policy == (lower if args.bf16 else None)
    assert plugin.fsdp_version == 2


@pytest.mark.parametrize(
    ("file", "shards", "message"),
    [
        ("pytorch_model_fsdp_0/.metadata", False, r"is sharded. Resume it with `accelerate launch` and fsdp2.yaml"),
        ("model.safetensors", True, "was saved by a run that does not shard the model."),
    ],
)
def test_a_checkpoint_resumes_only_as_it_was_saved(tmp_path, file, shards, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=message):
        check_sharding(str(tmp_path), shards)
    check_sharding(str(tmp_path), not shards)
