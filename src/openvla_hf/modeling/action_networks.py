"""Add the networks of OpenVLA-OFT to a plain policy, for fine-tuning or for an adapter that needs them."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .action_heads import ActionHead, InputProjector
from .configuration_openvla import OFT_FIELDS, OpenVLAConfig
from .film import FilmLayer, add_film
from .known_names import check_name


# Last parts of the names of these networks, including those of FiLM in the layers of the vision towers.
NETWORKS = ("action_head", "proprio_projector", "noisy_action_projector", "film_scale", "film_shift")


def action_fields(config: OpenVLAConfig) -> dict[str, Any]:
    """Return the fields that OpenVLA-OFT adds to a config."""
    return {name: getattr(config, name) for name in OFT_FIELDS}


def list_networks(model: nn.Module) -> list[str]:
    """List the networks of `NETWORKS` that a model has."""
    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return [name for name in NETWORKS if name in found]


def add_action_networks(model: PreTrainedModel, fields: Mapping[str, Any], where: str = "`fields`") -> None:
    """Set fields of a policy's config, and add the networks that they need.

    Heads and projectors start from random weights, and FiLM from zeros, which leave the features unchanged.

    Args:
        model: Policy without these networks, or one whose config already has the same values.
        fields: Fields that OpenVLA-OFT adds to the config (`OFT_FIELDS`).
        where: Origin of the fields, for messages.

    Raises:
        ValueError: A field is unknown or out of range, or the policy already has other networks.
    """
    config = model.config
    for name in fields:
        check_name(name, OFT_FIELDS, f"field in {where}:")
    if changed := [name for name, value in fields.items() if getattr(config, name) != value]:
        if list_networks(model):
            raise ValueError(
                f"{where} has {changed[0]}={fields[changed[0]]!r}, but the model already has networks for "
                f"{changed[0]}={getattr(config, changed[0])!r}. Start from a plain checkpoint."
            )
        for name in changed:
            setattr(config, name, fields[name])
        config.check_action_fields()
        _add(model)


def _add(model: PreTrainedModel) -> None:
    config, width = model.config, model.config.text_config.hidden_size

    def ready(network: nn.Module) -> nn.Module:
        return network.to(model.device, model.dtype).train(model.training)

    if config.proprio_dim is not None:
        model.model.proprio_projector = ready(InputProjector(config.proprio_dim, width))
    if config.action_head == "diffusion":
        model.model.noisy_action_projector = ready(InputProjector(1, width))
    if config.action_head != "none":
        model.action_head = ready(ActionHead(config))
    if config.use_film:
        for tower in model.model.vision_backbone.towers:
            add_film(tower, width)
            for layer in tower.modules():
                if isinstance(layer, FilmLayer):
                    layer.start_as_identity(model.device, model.dtype)


__all__ = ["NETWORKS", "action_fields", "add_action_networks", "list_networks"]
