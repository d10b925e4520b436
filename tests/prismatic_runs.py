"""Training runs and vision-language models, as the original's training code (Prismatic) saves them."""

import json

import torch


FUSED, SINGLE = "prism-dinosiglip-224px+7b", "siglip-224px+7b"


def as_trained(published):
    """Convert published weights to the form in which the original's training code saves them."""
    parts = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    fused = any("fused_featurizer" in name for name in published)
    for name, tensor in published.items():
        part, _, rest = name.partition(".")
        if part == "language_model":
            parts["llm_backbone"][f"llm.{rest}"] = tensor
        elif part == "projector":
            layer, kind = rest.split(".")
            parts["projector"][f"projector.{2 * int(layer[2]) - 2}.{kind}"] = tensor
        else:
            if fused:
                rest = f"siglip_{rest[6:]}" if rest.startswith("fused_") else f"dino_{rest}"
            parts["vision_backbone"][rest.replace(".scale_factor", ".gamma")] = tensor
    return parts


def write_run(folder, parts, statistics, base=FUSED, name="step-000010-epoch-00-loss=0.1000.pt"):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"run_id": "mine", "vla": {"base_vlm": base, "vla_id": "mine"}}))
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    torch.save({"model": parts, "optimizer": {"state": torch.ones(3)}}, folder / "checkpoints" / name)
    return folder


def write_vlm(folder, parts, **fields):
    """Write a vision-language model. The file of one whose towers were not trained has no part `vision_backbone`."""
    (folder / "checkpoints").mkdir(parents=True)
    model = {
        "model_id": FUSED,
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
    }
    config = {"model": model | fields, "dataset": {"type": "llava-lvis4v-lrv"}, "stage": "finetune", "seed": 7}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": parts}, folder / "checkpoints" / "latest-checkpoint.pt")
    return folder
