"""The throughput that a run logs: operations as PyTorch counts them, and rates of known GPUs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config, tiny_tokenizer
from openvla_hf.training.recipes import recipe
from openvla_hf.training.throughput import find_matrix_rate, training_operations


@pytest.mark.parametrize("name", ["full", "frozen-vision", "last-layer", "lora"])
def test_the_operations_of_a_step_are_those_of_its_matrix_products(name):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, image_size=224)
    fields = {"lora_rank": 2} if name == "lora" else {}
    model = recipe(name, dtype="float32", **fields).prepare(OpenVLAForActionPrediction(config))
    samples, images = 2, config.num_image_tokens
    ids = torch.full((samples, images + 40), 5)
    ids[:, 1 : images + 1] = config.image_token_id
    pixels = torch.zeros(samples, 6, 224, 224)
    kept = torch.tensor([[ids.shape[1] - 1]] * samples)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=kept, use_cache=False).logits.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    of_sample, of_token = training_operations(model)
    assert of_sample * samples + of_token * ids.numel() == pytest.approx(products, rel=0.05)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_matrix_rate_of_a_gpu_comes_from_its_name(monkeypatch, name, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_matrix_rate(torch.device("cuda"), torch.bfloat16) == rate
    assert find_matrix_rate(torch.device("cuda"), torch.float32) is None
    assert find_matrix_rate(torch.device("cpu"), torch.bfloat16) is None
