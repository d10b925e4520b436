"""Settings of FSDP2 that do not come from its configuration files. `test_distributed.py` trains with FSDP2."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import openvla_hf
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config
from openvla_hf.training.recipes import recipe
from openvla_hf.training.sharding import check_sharding, configure_sharding


FSDP2 = Path(openvla_hf.__file__).parent / "configs" / "fsdp2.yaml"


@pytest.fixture
def launched(monkeypatch):
    """Set the environment as `accelerate launch` does for fsdp2.yaml."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in yaml.safe_load(FSDP2.read_text())["fsdp_config"].items():
        monkeypatch.setenv(name.upper().replace("LAYER_CLS", "CLS"), str(value))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_added_up_in_float32(tmp_path, launched, dtype):
    args = recipe("full", dtype=dtype).training_arguments(str(tmp_path))
    configure_sharding(args, nn.Linear(1, 1))
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args or {})
    if args.bf16:
        plugin.set_mixed_precision("bf16")  # as accelerate does
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert plugin.mixed_precision_policy == (lower if args.bf16 else None)
    assert plugin.fsdp_version == 2


@pytest.mark.parametrize(("fused", "blocks"), [(False, 2), (True, 3)])
def test_the_blocks_of_one_tower_and_of_two_are_sharded(tmp_path, launched, fused, blocks):
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(tiny_config(fused=fused))
    args = recipe("full", dtype="float32").training_arguments(str(tmp_path))
    configure_sharding(args, model)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    plugin.set_auto_wrap_policy(model)
    assert len(plugin.auto_wrap_policy.keywords["transformer_layer_cls"]) == blocks


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
