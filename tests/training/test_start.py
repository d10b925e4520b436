"""Training starts from parts that have never acted, and the result acts."""

import numpy as np
import pytest
from model_parts import write_dinov2, write_llama, write_siglip
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.assemble import assemble
from openvla_hf.data import write_lerobot
from openvla_hf.serving.policy import ServedPolicy
from openvla_hf.testing import fake_episode
from openvla_hf.training.arguments import FinetuneArguments, TrainingData
from openvla_hf.training.finetune import finetune


SMALL = {"max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0, "use_cpu": True}


@pytest.mark.slow
def test_a_policy_that_is_pretrained_from_its_parts_acts(cache, tmp_path):
    write_dinov2(tmp_path / "dinov2")
    write_siglip(tmp_path / "siglip")
    write_llama(tmp_path / "llama")
    parts = {name: tmp_path / name for name in ("dinov2", "siglip")} | {"language_model": tmp_path / "llama"}
    start = assemble(tmp_path / "start", **parts, image_size=56, dtype="float32")
    with pytest.raises(ValueError, match="has no action statistics"):
        ServedPolicy(AutoModel.from_pretrained(start), AutoProcessor.from_pretrained(start))

    episodes = [fake_episode(seed=seed) for seed in range(2)]
    write_lerobot(episodes, tmp_path / "kitchen")
    result = finetune(
        FinetuneArguments(
            model=str(start),
            data=(TrainingData(str(tmp_path / "kitchen")),),
            output=tmp_path / "run",
            recipe="openx-small",
            settings=SMALL | {"dataloader_num_workers": 0, "logging_steps": 1},
        )
    )
    assert np.isfinite(result.figures["loss"])
    model, processor = AutoModel.from_pretrained(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    assert set(model.norm_stats) == {"kitchen"}
    before, after = AutoModel.from_pretrained(start).state_dict(), model.state_dict()
    for part in ("projector.fc1", "fused_featurizer.encoder.layers.0.mlp.fc1", "language_model.layers.1.mlp.up_proj"):
        (name,) = [name for name in after if part in name and name.endswith("weight")]
        assert not before[name].equal(after[name]), name
    frame = episodes[0][0]
    action = model.predict_action(**processor(frame["image"], instruction=frame["instruction"]))
    low, high = (np.array(model.norm_stats["kitchen"]["action"][name]) for name in ("q01", "q99"))
    assert action.shape == (7,)
    assert ((low <= action + 1e-9) & (action <= high + 1e-9))[:6].all()
