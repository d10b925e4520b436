"""Make the recordings in `kept` from the full ones: `python tests/parity/make_fixture.py DIR`.

README.md lists what is kept.
"""

import json
import lzma
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from keep_open_x import keep_open_x
from oft_recordings import RecordedOFT, our_name
from PIL import Image
from recordings import ADAPTED_HEAD, BASE, EMBEDDING, HEAD, KEPT, Recorded
from safetensors.torch import load, load_file, save
from tokenizers import Tokenizer
from torch.nn.functional import pad


STRIDE = 16  # of pixels, patches, positions and rows of gradients
VOCABULARY = 32064
TAIL = 31744  # first of the columns whose logits are recorded in every step: the action ids and the padded rows
WITH_LOGITS = (0, 5, 10, 15, 17)  # predictions whose logits and hidden states are kept
WITH_HIDDEN_TEXT = (7, 9)
# Small images for the image processor: with an alpha channel, in grey, with a palette.
PROCESSOR_IMAGES = {
    "resize-crop-fused": [4, 5, 6],
    "resize-crop-fused-f32stats": [5],
    "letterbox-fused": [4],
    "resize-naive-siglip": [5],
}
# Images for TensorFlow's resizing: one shrinks in height and grows in width, one grows in both. The third has the size
# of LIBERO's cameras, and is kept as it was before the compression. Of the results, every fourth or 16th row is kept.
EVALUATION_IMAGES = {
    3: {"jpeg": 1, "resized": 4, "resized_cropped": 4},
    4: {"jpeg": 1, "resized": 4, "resized_cropped": 4},
    5: {"raw": 1, "resized": 16},
}
PREDICTION = ("image", "prompt", "unnorm_key", "appended_29871", "n_steps", "action_token_ids")


def main(golden: Path, target: Path = KEPT) -> None:
    """Write every case's part into `target`."""
    adapter = load_file(golden / "lora" / "expected.safetensors")
    samples = json.loads((golden / "action-tokenizer" / "expected.json").read_text())["training_samples"]
    for case, builder, adapted in ((BASE, "pure", adapter), ("siglip-224", "vicuna", {})):
        keep_case(golden / case, target / case, [s for s in samples if s["builder"] == builder], adapted)
    shutil.copyfile(golden / BASE / "mutations.json", target / BASE / "mutations.json")
    keep_shards(golden, target / "sharded")
    keep_adapter(golden / "lora", target / "lora", columns_of(target / BASE))
    keep_images(golden / "image-processor", target / "image-processor")
    keep_evaluation_images(golden / "oft-image" / "images", target / "oft-image" / "images")
    keep_actions(golden, target)
    keep_heads(golden, target / "oft-heads")
    keep_open_x(golden / "oxe", target / "open-x")


def keep_case(source: Path, target: Path, samples: list[dict[str, Any]], adapted: dict[str, torch.Tensor]) -> None:
    """Keep a checkpoint and its recordings.

    Args:
        source: The full recordings.
        target: The kept ones.
        samples: Training samples whose prompts are kept.
        adapted: Recordings with an adapter, whose ids the checkpoint must also contain.
    """
    record = Recorded(source)
    tensors, predictions = record.tensors, record.expected["predictions"]
    text = {index for prediction in predictions for index in prediction["generate_input_ids"]}
    text |= set(record.training_batch["input_ids"].flatten().tolist()) | {0, 1, 2}
    chosen = {index for prediction in predictions for index in prediction["action_token_ids"]}
    chosen |= {step["argmax_last"] for step in record.expected["forward"]}
    for name, tensor in (tensors | adapted).items():
        if name.endswith((".generated_ids", ".action_preds")):
            chosen |= set(tensor.flatten().tolist())
    read, columns = sorted(text | chosen), sorted(text | chosen | set(range(TAIL, VOCABULARY)))

    checkpoint = target / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "checkpoint" / "model.safetensors")
    clear(weights, record.expected["train"]["grad_none"])
    weights[EMBEDDING], weights[HEAD] = only(weights[EMBEDDING], read), only(weights[HEAD], columns)
    write(weights, checkpoint / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copyfile(source / "checkpoint" / name, checkpoint / name)
    for name in ("tiny_dims.json", "inputs.safetensors"):
        shutil.copyfile(source / name, target / name)

    kept = {name: cut(name, tensor, columns) for name, tensor in tensors.items() if is_kept(name)}
    write(kept | {"train.left_out": left_out(record, columns)}, target / "expected.safetensors")
    train = record.expected["train"]
    del train["grad_norms"][HEAD]  # of all rows
    short = [{field: prediction[field] for field in PREDICTION} for prediction in predictions]
    write_json({"predictions": short, "train": train}, target / "expected.json")

    cases = record.cases
    # The same pixels from a file of a fifth of the size.
    cases["images"][0] = "images/0_224x224.webp"
    keep_resized(record, 0, target, cases["images"][0])
    for path in cases["images"][1:]:
        shutil.copyfile(source / path, target / path)
    write_json(cases, target / "cases.json")
    tokenizer = Tokenizer.from_file(str(source / "checkpoint" / "tokenizer.json"))
    prompts = {text: tensors[f"prompt.{index}.input_ids"][0].tolist() for index, text in enumerate(cases["prompts"])}
    for sample in samples:
        ids = sample["input_ids"][: -len(sample["action_token_ids"]) - 2]
        prompts[tokenizer.decode(ids)] = ids
    write_json(prompts, target / "prompts.json")


def keep_shards(golden: Path, target: Path) -> None:
    """Keep the index and the recordings in bfloat16. Those in float32 equal the recordings of the whole checkpoint."""
    sharded = load_file(golden / "sharded" / "expected.safetensors")
    (target / "checkpoint").mkdir(parents=True, exist_ok=True)
    index = json.loads((golden / "sharded" / "checkpoint" / "model.safetensors.index.json").read_text())
    write_json(index, target / "checkpoint" / "model.safetensors.index.json")
    columns = columns_of(target.parent / BASE)
    kept = ("bf16.projector_output", *(f"bf16.forward.{k}.logits_last" for k in (0, 5, 10)))
    write({name: cut(name, sharded[name], columns) for name in kept}, target / "expected.safetensors")
    expected = json.loads((golden / "sharded" / "expected.json").read_text())["bf16"]["train"]
    write_json({"bf16": {"train": {"loss": expected["loss"]}}}, target / "expected.json")


def keep_adapter(source: Path, target: Path, columns: list[int]) -> None:
    """Keep the adapter, except for weights that the original never reads and for its copy of the base model's head."""
    (target / "adapter").mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "adapter" / "adapter_model.safetensors")
    unread = json.loads((source / "expected.json").read_text())["lora_grad_none"]
    clear(weights, [name.replace(".default.weight", ".weight") for name in unread])
    for name, tensor in weights.items():
        if tensor.shape[0] == VOCABULARY:
            weights[name] = only(tensor, columns)
    del weights[ADAPTED_HEAD]
    write(weights, target / "adapter" / "adapter_model.safetensors")
    shutil.copyfile(source / "adapter" / "adapter_config.json", target / "adapter" / "adapter_config.json")
    shutil.copyfile(source / "cases.json", target / "cases.json")
    kept = ("generated_ids", ".actions", "logits_last")
    tensors = load_file(source / "expected.safetensors").items()
    write(
        {
            name: cut(name, tensor, columns)
            for name, tensor in tensors
            if name.startswith(("unmerged.", "merged.")) and name.endswith(kept)
        },
        target / "expected.safetensors",
    )


def keep_images(source: Path, target: Path) -> None:
    """Keep a grid of the pixels that the image processor gives for a few small images."""
    cases, tensors = json.loads((source / "cases.json").read_text()), load_file(source / "expected.safetensors")
    (target / "images").mkdir(parents=True, exist_ok=True)
    kept = {}
    for variant, indices in PROCESSOR_IMAGES.items():
        (target / variant).mkdir(exist_ok=True)
        name = f"{variant}/preprocessor_config.json"
        shutil.copyfile(source / name, target / name)
        cases["variants"][variant]["images"] = indices
        for index in indices:
            shutil.copyfile(source / cases["images"][index], target / cases["images"][index])
            kept[f"{variant}.{index}"] = tensors[f"{variant}.{index}"][:, ::STRIDE, ::STRIDE]
    write(kept, target / "expected.safetensors")
    write_json(cases, target / "cases.json")


def keep_evaluation_images(source: Path, target: Path) -> None:
    """Keep images before the steps of the original's evaluation, and rows of the results."""
    target.mkdir(parents=True, exist_ok=True)
    for index, strides in EVALUATION_IMAGES.items():
        for name, stride in strides.items():
            pixels = np.asarray(Image.open(source / f"{index}.{name}.png"))
            save_image(Image.fromarray(pixels[::stride]), target / f"{index}.{name}.webp")


def keep_actions(golden: Path, target: Path) -> None:
    """Keep the recordings of action tokens and of normalisation."""
    for name, part in (("action-tokenizer", "training_samples"), ("normalisation", "normalisation")):
        (target / name).mkdir(parents=True, exist_ok=True)
        recorded = json.loads((golden / name / "expected.json").read_text())[part]
        pack(json.dumps({part: recorded}).encode(), target / name / "expected.json")
    tokens = "action-tokenizer/expected.safetensors"
    write(load_file(golden / tokens), target / tokens)


def is_kept(name: str) -> bool:
    """Whether a tensor of a case is kept."""
    kind, _, rest = name.partition(".")
    if kind not in ("predict", "forward"):
        return True
    k, _, what = rest.partition(".")
    if what in ("generated_ids", "normalized_actions", "actions"):
        return True
    return what not in ("step_top5_ids", "step_top5_values") and int(k) in WITH_LOGITS + WITH_HIDDEN_TEXT


def cut(name: str, tensor: torch.Tensor, columns: list[int]) -> torch.Tensor:
    """Cut a tensor to its kept part: every 16th pixel, patch, position or row of a gradient, and kept ids' logits."""
    if name.endswith("pixel_values"):
        tensor = tensor[..., ::STRIDE, ::STRIDE]
    elif name.endswith(("_features", "projector_output")):
        tensor = tensor[:, ::STRIDE]
    elif name.endswith(("hidden_last", "hidden_text")) or (name.startswith("grad.") and "lm_head" not in name):
        tensor = tensor[::STRIDE]
    elif tensor.shape[-1] == VOCABULARY:
        tensor = tensor[..., columns]
    return tensor.contiguous()


def left_out(record: Recorded, columns: list[int]) -> torch.Tensor:
    """Summarise how the head's dropped rows affect the loss of the training batch at each supervised position.

    The loss depends on these rows only through the logarithm of the sum of their exponentials. The tangent plane of
    this logarithm at a position's hidden state gives the loss and its gradients, up to second-order terms in the
    difference between two float32 computations of the hidden state.

    Returns:
        (positions, D + 1): slope and offset of one logit. If every dropped row has this logit, their sum is right.
    """
    batch = record.training_batch
    pixel_values = record.pixel_values[[sample["image"] for sample in record.cases["train"]]]
    states: list[torch.Tensor] = []
    hook = record.model.lm_head.register_forward_hook(lambda head, arguments, logits: states.append(arguments[0]))
    with torch.no_grad():
        record.model(batch["input_ids"], pixel_values, batch["attention_mask"])
    hook.remove()
    patches = states[0].shape[1] - batch["labels"].shape[1]
    hidden = states[0][pad(batch["labels"][:, 1:] != -100, (patches, 1))].double()
    rows = record.model.lm_head.weight.detach().double()
    rows = rows[~torch.isin(torch.arange(len(rows)), torch.tensor(columns))]
    logits = hidden @ rows.T
    slope = logits.softmax(-1) @ rows
    offset = logits.logsumexp(-1) - math.log(len(rows)) - (slope * hidden).sum(-1)
    return torch.cat([slope, offset[:, None]], dim=1).float()


def keep_resized(record: Recorded, index: int, target: Path, path: str) -> None:
    """Keep an image after the processor's resizing and before its normalisation."""
    processor, pixels = record.processor.image_processor, record.tensors["pixel_values"][index]
    mean, std = (torch.tensor(values)[-1, :, None, None] for values in (processor.image_mean, processor.image_std))
    levels = ((pixels[-3:] * std + mean) * 255).round().to(torch.uint8)
    (target / path).parent.mkdir(exist_ok=True)
    save_image(Image.fromarray(levels.permute(1, 2, 0).numpy()), target / path)
    if not torch.equal(processor(target / path)["pixel_values"][0], pixels):
        raise ValueError(f"{path} does not give the recorded pixels of image {index}.")


def keep_heads(golden: Path, target: Path) -> None:
    """Keep an action head, a projector of the state and a noise schedule, with their inputs and outputs."""
    record, diffusion = RecordedOFT(golden / "oft-l1"), RecordedOFT(golden / "oft-diffusion")
    kept = {}
    for component in ("action_head", "proprio_projector"):
        (path,) = record.checkpoint.glob(f"{component}--*")
        weights = torch.load(path, weights_only=True)
        kept |= {our_name(component, name.removeprefix("module.")): tensor for name, tensor in weights.items()}
    key = record.predictions[0]["unnorm_key"]
    statistics = json.loads((record.checkpoint / "dataset_statistics.json").read_text())[key]
    for of_what, names in {"action": ("q01", "q99", "mask"), "proprio": ("q01", "q99")}.items():
        kept |= {f"{of_what}.{name}": torch.tensor(statistics[of_what][name], dtype=torch.float64) for name in names}
    for k in (0, 1):  # the second state is beyond the bounds
        kept[f"state.{k}"] = torch.tensor(record.cases["states"][key][k], dtype=torch.float64)
        names = ("proprio_normalized", "proprio_embedding", "normalized_actions", "actions")
        kept |= {f"{name}.{k}": record.tensors[f"predict.{k}.{name}"] for name in names}
    kept["readout_hidden.1"] = record.tensors["predict.1.readout_hidden"]
    for name in ("scheduler.betas", "scheduler.alphas_cumprod", "predict10.0.timesteps"):
        kept[name] = diffusion.tensors[name]
    for name in ("noisy_actions", "predicted_noise", "time_embeddings"):
        kept[f"denoising.{name}"] = diffusion.tensors[f"predict10.0.{name}"]
    kept["denoising.actions"] = diffusion.tensors["predict10.0.normalized_actions"]
    target.mkdir(exist_ok=True)
    write(kept, target / "expected.safetensors")


def columns_of(kept: Path) -> list[int]:
    """Return the ids whose rows of the head are in a kept checkpoint."""
    head = read(kept / "checkpoint" / "model.safetensors")[HEAD]
    return head.any(dim=1).nonzero().flatten().tolist()


def only(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Set all rows of a tensor to zero, except these."""
    kept = torch.zeros_like(tensor)
    kept[rows] = tensor[rows]
    return kept


def clear(weights: dict[str, torch.Tensor], names: list[str]) -> None:
    """Set tensors to zero, which takes no room in a packed file."""
    for name in names:
        weights[name] = torch.zeros_like(weights[name])


def save_image(image: Image.Image, path: Path) -> None:
    """Write a WebP file without loss, which is smaller than PNG."""
    image.save(path, lossless=True, quality=100, method=6, exact=True)


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a packed safetensors file."""
    pack(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}), path)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content) + "\n")


def pack(content: bytes, path: Path) -> None:
    """Write a compressed file, with `.xz` added to its name."""
    # Numbers have two or four bytes, so the next byte depends on the position within a number.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2, "pb": 2}]
    path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(content, filters=filters))


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read a packed safetensors file."""
    return load(lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
