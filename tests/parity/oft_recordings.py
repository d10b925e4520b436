"""Read the recordings of OpenVLA-OFT's original code; README.md says what is recorded."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recordings import read_tower_overrides
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModel

import openvla_hf  # noqa: F401  registers the Auto classes


# Parts of the names in component files -> parts of our names.
COMPONENT_NAMES = {
    "noise_predictor.mlp_resnet.": "",
    "mlp_resnet_blocks.": "blocks.",
    ".ffn.0.": ".norm.",
    ".ffn.1.": ".linear.",
}
COMPONENTS = {
    "action_head": "action_head.",
    "proprio_projector": "model.proprio_projector.",
    "noisy_action_projector": "model.noisy_action_projector.",
}


def our_name(component: str, name: str) -> str:
    """Translate the name of a weight in a component's file."""
    for old, new in COMPONENT_NAMES.items():
        name = name.replace(old, new)
    return COMPONENTS[component] + name.removeprefix("model.")


class RecordedOFT:
    """A small OpenVLA-OFT checkpoint in the published layout, and the original code's outputs for it in float32."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        self.cases = json.loads((folder / "cases.json").read_text())
        self.expected = json.loads((folder / "expected.json").read_text())
        self.tensors = load_file(folder / "expected.safetensors")
        self.batch = {
            name.removeprefix("train."): one for name, one in load_file(folder / "inputs.safetensors").items()
        }
        self.predictions = self.expected["predictions"]

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        platform = json.loads((self.folder / "tiny_dims.json").read_text())["oft"]["platform"]
        overrides = read_tower_overrides(self.folder)
        named = {"platform": platform, "action_decoding": "parallel"}
        return AutoModel.from_pretrained(self.checkpoint, dtype=dtype, **named, **overrides)

    @functools.cached_property
    def model(self) -> Any:
        """The model, shared by all tests of a session, which must not change it."""
        return self.load()

    @functools.cached_property
    def pixel_values(self) -> torch.Tensor:
        """(observations, 3 * towers * images, H, W)."""
        process = AutoImageProcessor.from_pretrained(self.checkpoint)
        return torch.stack(
            [
                torch.cat(
                    [torch.as_tensor(process(Image.open(self.folder / path))["pixel_values"][0]) for path in paths]
                )
                for paths in self.cases["processed"]
            ]
        )

    def state(self, k: int) -> np.ndarray | None:
        prediction = self.predictions[k]
        if prediction.get("state") is None:
            return None
        return np.array(self.cases["states"][prediction["unnorm_key"]][prediction["state"]])

    def inputs(self, k: int) -> dict[str, Any]:
        """Arguments of `predict_action` for the k-th prediction."""
        prediction = self.predictions[k]
        inputs = {
            "input_ids": torch.tensor([prediction["prompt_ids"]]),
            "pixel_values": self.pixel_values[prediction["observation"]][None],
            "unnorm_key": prediction["unnorm_key"],
        }
        state = self.state(k)
        return inputs if state is None else inputs | {"state": state}

    def batch_inputs(self, rows: Any, side: str = "left") -> dict[str, Any]:
        """Arguments of `predict_action` for several predictions, padded on one side."""
        one_by_one = [self.inputs(k) for k in rows]
        prompts = [inputs["input_ids"][0] for inputs in one_by_one]
        padded = {
            name: pad_sequence(values, batch_first=True, padding_value=padding, padding_side=side)
            for name, values, padding in (
                ("input_ids", prompts, self.model.config.pad_token_id),
                ("attention_mask", [torch.ones_like(prompt) for prompt in prompts], 0),
            )
        }
        padded["pixel_values"] = torch.cat([inputs["pixel_values"] for inputs in one_by_one])
        padded["unnorm_key"] = [inputs["unnorm_key"] for inputs in one_by_one]
        if "state" in one_by_one[0]:
            padded["state"] = np.stack([inputs["state"] for inputs in one_by_one])
        return padded

    def training_inputs(self) -> dict[str, Any]:
        """Arguments of `forward` for the recorded training batch, whose ids also contain the actions."""
        length = self.batch["attention_mask"].sum(1) - self.batch["actions"][0].numel() - 1
        is_prompt = torch.arange(int(length.max())) < length[:, None]
        ids = self.batch["input_ids"][:, : is_prompt.shape[1]]
        inputs = {
            "input_ids": ids.where(is_prompt, self.model.config.pad_token_id),
            "attention_mask": is_prompt.long(),
            "pixel_values": self.pixel_values,
            "actions": self.batch["actions"],
        }
        return inputs | {name: one for name, one in self.batch.items() if name == "proprio"}
