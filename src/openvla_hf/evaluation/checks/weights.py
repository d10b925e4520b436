"""Check the weights of a policy, and that its adapter is applied exactly once."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from ...modeling.adapter_loading import ADAPTED, MERGED_FOLDER, PREFIX, is_published, our_name, split_fused
from ...modeling.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from .findings import Finding, Subject, failed, passed, skipped


# Larger values come from uninitialised memory.
LARGEST = 1e5
# Relative difference of frequencies that are rounded to 16 bits.
ROUNDING = 0.01
# Number of layers in which to look for an adapter.
LAYERS = 24
# The weights contain an adapter this many times: 0 and 1 are far enough apart if the measurement errs by less.
HALF, CERTAIN = 0.5, 0.2


@torch.no_grad()
def check_weights(subject: Subject) -> Finding:
    """Check that all weights and buffers are finite, and that no matrix has the same value everywhere."""
    wrong: dict[str, list[str]] = {"are not finite": [], "have one value everywhere": [], "are huge": []}
    count = 0
    for name, parameter in itertools.chain(subject.model.named_parameters(), subject.model.named_buffers()):
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        count += 1
        low, high = (float(bound) for bound in parameter.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong["are not finite"].append(name)
        elif max(-low, high) > LARGEST:
            wrong["are huge"].append(name)
        elif low == high and parameter.ndim > 1 and name.endswith(".weight") and ".lora_" not in name:
            wrong["have one value everywhere"].append(name)
    problems = [f"{len(names)} {what} (for example {names[0]!r})" for what, names in wrong.items() if names]
    if not problems:
        return passed("weights", f"{count} tensors are finite and not constant.")
    return failed(
        "weights",
        f"Of {count} weight tensors, {', and '.join(problems)}.",
        "Download or copy the checkpoint again. If it is new, train again from the last checkpoint that was finite.",
    )


def check_positions(subject: Subject) -> Finding:
    """Compare the frequencies of rotary positions, which no checkpoint contains, with those of the config."""
    name, count = "positions", 0
    for path, module in subject.model.model.language_model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if "inv_freq" not in buffers or buffers["inv_freq"].is_meta:
            continue
        count += 1
        given = buffers["inv_freq"].float().cpu()
        if not torch.allclose(given, type(module)(module.config).inv_freq.float().cpu(), rtol=ROUNDING, atol=0):
            found = f"The frequencies of {path} (`inv_freq`) are not those of the config."
            return failed(name, found, "Load the model with `from_pretrained`, which computes them from the config.")
    if not count:
        return skipped(name, "The language model has no rotary positions.")
    return passed(name, "The frequencies of the rotary positions are those of the config.")


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes to the weight of one layer: `scale * b @ a`.

    Attributes:
        weight: Weight of the layer in the model, without adapters that are active, (outputs, inputs).
        a: (rank, inputs).
        b: (outputs, rank).
        scale: Factor.
    """

    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def products(self) -> tuple[float, float, float]:
        """Return <weight, change>, <change, change>, and the variance of the first if the two are independent."""
        weight, a, b = (one.detach().float() for one in (self.weight, self.a, self.b))
        with_change = float(self.scale * ((b.T @ weight) * a).sum())
        square = float(self.scale**2 * ((b.T @ b) * (a @ a.T)).sum())
        return with_change, square, square * float(weight.square().mean())


@torch.no_grad()
def count_adapter(changes: Iterable[Change]) -> tuple[float, float] | None:
    """Measure how many times weights contain an adapter.

    Trained weights are nearly orthogonal to a change that they do not contain, so the projection of the weights on the
    change, over all layers, is close to the number of times that it was added.

    Returns:
        The number and its standard error, or `None` if the adapter changes nothing.
    """
    sums = [math.fsum(column) for column in zip(*(change.products() for change in changes), strict=True)]
    if not sums or sums[1] == 0:
        return None
    return sums[0] / sums[1], math.sqrt(sums[2]) / sums[1]


def check_adapter(subject: Subject) -> Finding:
    """Check that the adapter in use, or the one that lies beside merged weights, is applied exactly once."""
    adapted = [layer for layer in subject.model.modules() if isinstance(layer, LoraLayer)]
    if adapted and all(layer.disable_adapters for layer in adapted):
        return failed("adapter", "The adapter is loaded, but disabled.", "Call `model.enable_adapters()`.")
    active = [change for layer in adapted if not layer.merged for change in _changes(layer)]
    if active:
        return _judge_active(count_adapter(_spread(active)), len(active))
    if adapted:
        return passed("adapter", f"Active in {len(adapted)} layers, whose weights are quantised or merged.")
    folder = _folder_beside(subject)
    if folder is None:
        return skipped("adapter", "The policy has no adapter.")
    changes = list(_read(subject.model, folder))
    if not changes:
        return skipped("adapter", f"The layers of the adapter in {folder} are quantised.")
    return _judge_merged(count_adapter(_spread(changes)), folder)


def _judge_active(counted: tuple[float, float] | None, layers: int) -> Finding:
    if counted is None:
        return failed(
            "adapter",
            "The adapter changes nothing: B is zero in every layer.",
            "Load the adapter of the trained run; a new one starts at zero.",
        )
    times, error = counted
    if error > CERTAIN:
        return passed("adapter", f"Active in {layers} layers. It is too small to say whether the base contains it.")
    if times > HALF:
        return failed(
            "adapter",
            f"Applied twice: the weights of the base already contain it {times:.2f} times.",
            "Load the merged weights without the adapter, or the adapter with the base that it was trained on.",
        )
    return passed("adapter", f"Active in {layers} layers, and not in the weights of the base ({times:.2f} times).")


def _judge_merged(counted: tuple[float, float] | None, folder: Path) -> Finding:
    if counted is None:
        return skipped("adapter", f"The adapter in {folder} changes nothing.")
    times, error = counted
    found = f"The weights contain the adapter in {folder} {times:.2f} times (with an error of {error:.2f})."
    if error > CERTAIN:
        return passed("adapter", found)
    if times < HALF:
        return failed(
            "adapter",
            f"Missing. {found}",
            "Merge it with `openvla-hf merge`, or load the adapter instead of its base.",
        )
    if times > 1 + HALF:
        return failed(
            "adapter", f"Merged more than once. {found}", "Merge the adapter into its base again, only once."
        )
    return passed("adapter", found)


def _spread(changes: list[Change]) -> list[Change]:
    """Take some changes, spread over all layers."""
    return changes[:: -(-len(changes) // LAYERS)]


def _is_dense(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2 and not weight.is_meta


def _changes(layer: LoraLayer) -> Iterator[Change]:
    """Yield the changes of the adapters in a layer, unless its weight is quantised."""
    weight = layer.get_base_layer().weight
    for name in layer.active_adapters:
        if name in layer.lora_A and _is_dense(weight):
            yield Change(weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _folder_beside(subject: Subject) -> Path | None:
    """Return the folder of the adapter that the original keeps beside merged weights, if the checkpoint is local."""
    source = subject.files.source
    if source is None or not os.path.isdir(source):
        return None
    folder = Path(source, MERGED_FOLDER)
    return folder if all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)) else None


def _read(model: Any, folder: Path) -> Iterator[Change]:
    """Yield the changes of an adapter to layers of a model; layers that are quantised or absent are left out."""
    config, tensors = read_json(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER_WEIGHTS)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    published = is_published(list(tensors))
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for path, part in split_fused(our_name(model, name) if published else name, tensor):
            if (match := ADAPTED.match(path)) is not None:
                sides.setdefault(match["layer"], {})[match["side"]] = part
    layers = dict(model.named_modules())
    for name, pair in sorted(sides.items()):
        weight = layers[name].weight if name in layers else None
        if _is_dense(weight) and len(pair) == len(("A", "B")):
            yield Change(weight, pair["lora_A"].to(weight.device), pair["lora_B"].to(weight.device), scale)  # type: ignore[union-attr]


__all__ = ["Change", "check_adapter", "check_positions", "check_weights", "count_adapter"]
