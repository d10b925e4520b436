"""Push a tiny policy and its adapter to a stand-in for the Hub, and keep the contents of the two repositories.

    git worktree add before 67ad3d4
    PYTHONPATH=before/src:before/tests python make.py checkpoints.tar.xz expected.json

The script needs the package as it was at that commit: `openvla_hf.hub` has moved since.
"""

import copy
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hub_server import HubServer
from huggingface_hub import constants
from openvla_hf.hub import push
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel

import openvla_hf
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor, tiny_tokenizer


INSTRUCTION = "pick up the red block"


def make_image() -> np.ndarray:
    """(40, 56, 3) uint8: colours that change slowly along both sides, so that resizing matters little."""
    rows, columns = np.indices((40, 56))
    return np.stack([6 * rows, 4 * columns, 255 - 3 * (rows + columns) // 2], axis=-1).astype(np.uint8)


def fill(parameters: Iterable[torch.nn.Parameter], std: float) -> None:
    """Fill weights with random 16-bit numbers, which compress well."""
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=std)
        parameter.data = parameter.data.bfloat16().float()


def act(model: Any, processor: Any) -> dict[str, list[float]]:
    details = model.predict_action(**processor(make_image(), instruction=INSTRUCTION), return_details=True)
    top = torch.as_tensor(details.probabilities[0]).log().topk(2).values
    print("smallest distance between the two best tokens:", float((top[:, 0] - top[:, 1]).min()))
    return {"action": details.actions[0].tolist(), "token_ids": details.token_ids[0].tolist()}


def main(archive: str, record: str) -> None:
    tokenizer = tiny_tokenizer(merges=16)
    config = tiny_config(
        tokenizer, image_size=28, vision_width=16, vision_layers=2, text_width=16, text_layers=1,
        norm_stats={"kitchen": {"action": BRIDGE_LIKE_STATS, "num_transitions": 5, "num_trajectories": 1}},
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = AutoModel.from_config(config).eval(), tiny_processor(tokenizer, config)
    fill(model.parameters(), std=0.3)
    expected = {"instruction": INSTRUCTION, "policy": act(model, processor)}
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder, "hub")) as hub:
        constants.ENDPOINT = hub.endpoint
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_DISABLE_XET = True
        push(model, "lab/policy", processor=processor, token=hub.token)

        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        adapted.peft_config["default"].base_model_name_or_path = "lab/policy"
        fill([weight for name, weight in adapted.named_parameters() if "lora_" in name], std=0.3)
        adapter = Path(folder, "adapter")
        adapted.save_pretrained(adapter)
        processor.save_pretrained(adapter)
        statistics = {"counter": {"action": BRIDGE_LIKE_STATS | {"q99": [0.1] * 6 + [1.0]}}}
        (adapter / "dataset_statistics.json").write_text(json.dumps(statistics))
        push(adapter, "lab/policy-adapter", base_model="lab/policy", token=hub.token)
        expected["adapter"] = act(openvla_hf.load_adapter(model, adapter), processor)

        image = io.BytesIO()
        Image.fromarray(make_image()).save(image, "png")
        files = {"image.png": image.getvalue()}
        for repository in ("policy", "policy-adapter"):
            files |= {f"{repository}/{name}": content for name, content in hub.files(f"lab/{repository}").items()}
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    Path(record).write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
