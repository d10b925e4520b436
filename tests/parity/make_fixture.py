"""Makes the recordings beside this file from the golden files: `python make_fixture.py ../../../shared/golden`.

Rows of the embedding and the head that no recorded prompt or action uses are left out; see README.md.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


HERE = Path(__file__).resolve().parent
CASE, IMAGE = "fused-224", 1
TAIL = 31744  # first of the columns of which logits are recorded: the action ids and the padded rows
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
# Images of the image processor's cases that are small: another size, with alpha, grey, with a palette.
PROCESSOR_IMAGES = {"resize-crop-fused": [4, 5, 6], "letterbox-fused": [4], "resize-naive-siglip": [5]}
PIXEL_STRIDE = 16


def main(golden: Path) -> None:
    """Write checkpoint, inputs and expected outputs."""
    make_model(golden / CASE)
    make_images(golden / "image-processor")


def make_model(source: Path) -> None:
    """Record the predictions for one image, and the weights that they read."""
    target = HERE / CASE
    target.mkdir(exist_ok=True)
    cases, expected = (json.loads((source / f"{name}.json").read_text()) for name in ("cases", "expected"))
    tensors = load_file(source / "expected.safetensors")
    predictions = [
        {"k": k, "key": p["unnorm_key"], "input_ids": p["generate_input_ids"], "token_ids": p["action_token_ids"]}
        for k, p in enumerate(expected["predictions"])
        if p["image"] == IMAGE
    ]
    used = sorted({i for p in predictions for i in p["input_ids"] + p["token_ids"]})

    weights = load_file(source / "checkpoint" / "model.safetensors")
    for name in expected["train"]["grad_none"]:  # in the file, and never read
        del weights[name]
    for name, rows in ((EMBEDDING, used), (HEAD, sorted({*used, *range(TAIL, len(weights[HEAD]))}))):
        weights[name], weights[f"{name}.ids"] = weights[name][rows].clone(), torch.tensor(rows)
    save_file(weights, target / "weights.safetensors")

    recorded = {name: tensors[name][IMAGE].clone() for name in ("dino_features", "siglip_features")}
    recorded["projector_output"] = tensors["projector_output"][IMAGE].clone()
    recorded["pixel_values"] = tensors["pixel_values"][IMAGE, :, ::PIXEL_STRIDE, ::PIXEL_STRIDE].clone()
    for prediction in predictions:
        for name in ("step_logits_tail", "actions"):
            recorded[f"{prediction['k']}.{name}"] = tensors[f"predict.{prediction['k']}.{name}"]
    save_file(recorded, target / "expected.safetensors")
    (target / "predictions.json").write_text(json.dumps(predictions) + "\n")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(source / "checkpoint" / name, target / name)
    shutil.copyfile(source / "tiny_dims.json", target / "tiny_dims.json")
    shutil.copyfile(source / cases["images"][IMAGE], target / "image.png")


def make_images(source: Path) -> None:
    """Record a grid of the pixels that the image processor gives for a few small images."""
    target = HERE / "image-processor"
    target.mkdir(exist_ok=True)
    images = json.loads((source / "cases.json").read_text())["images"]
    tensors, recorded = load_file(source / "expected.safetensors"), {}
    for variant, indices in PROCESSOR_IMAGES.items():
        shutil.copyfile(source / variant / "preprocessor_config.json", target / f"{variant}.json")
        for index in indices:
            name = Path(images[index]).name
            shutil.copyfile(source / images[index], target / name)
            pixels = tensors[f"{variant}.{index}"]
            recorded[f"{variant}/{name}"] = pixels[:, ::PIXEL_STRIDE, ::PIXEL_STRIDE].clone()
    save_file(recorded, target / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
