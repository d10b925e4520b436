"""A lower bound on the time of an action: what a model must read and compute, at the measured speed of the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..modeling.parallel_decoding import num_new_tokens


@dataclass
class Work:
    """The least that one pass reads and computes: its weights, and two operations for each weight and token.

    Attention and activations are left out. They add little at these lengths, and the bound stays valid without them.
    """

    weight_bytes: int
    operations: int

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], tokens: int) -> "Work":
        """Count the work of parameters that are read once and multiplied with each of the tokens."""
        return cls(sum(p.nbytes for p in parameters), 2 * tokens * sum(p.numel() for p in parameters))

    def seconds(self, bandwidth: float, matmul: float) -> float:
        """Return the least time in seconds, reached when reading and computing overlap."""
        return max(self.weight_bytes / bandwidth, self.operations / matmul)


class Floor:
    """The least time in seconds of each part of a model, for a batch on a device.

    Args:
        model: The policy.
        batch: Observations in a call.
        prompt: Tokens of the prompt, image placeholders included.
        bandwidth: Bytes per second that the device reads.
        matmul: Floating-point operations per second of the device.
    """

    def __init__(
        self, model: OpenVLAForActionPrediction, batch: int, prompt: int, bandwidth: float, matmul: float
    ) -> None:
        self.batch, self.prompt, self.config = batch, prompt, model.config
        self.bandwidth, self.matmul = bandwidth, matmul
        base = model.model
        self.film = [p for name, p in base.vision_backbone.named_parameters() if ".film_" in name]
        of_film = set(map(id, self.film))
        vision = [*base.vision_backbone.parameters(), *base.projector.parameters()]
        self.vision = [p for p in vision if id(p) not in of_film]
        embedding = base.get_input_embeddings().weight
        self.language = [p for p in base.language_model.parameters() if p is not embedding]
        self.head = [model.lm_head.weight[: self.config.n_action_bins]]
        self.action_head = None if model.action_head is None else list(model.action_head.parameters())

    def least(self, parameters: Sequence[torch.Tensor], tokens: int) -> float:
        """Return the least time to multiply parameters with this many tokens of each row."""
        return Work.of(parameters, self.batch * tokens).seconds(self.bandwidth, self.matmul)

    def see(self) -> float:
        """Return the least time of the vision towers and the projector."""
        # FiLM reads one embedding of the text for each row.
        patches = self.config.num_images * self.config.num_image_tokens
        return self.least(self.vision, patches) + self.least(self.film, 1)

    def token_by_token(self, steps: int) -> dict[str, float]:
        """Return the least times of vision, prefill and decode, in total and with an accepted draft."""
        parts = {
            "vision": self.see(),
            "prefill": self.least(self.language, self.prompt) + self.least(self.head, 1),
            "decode": (steps - 1) * self.least([*self.language, *self.head], 1),
        }
        drafted = self.least(self.language, self.prompt + steps - 1) + self.least(self.head, steps)
        return parts | {"predict_action": sum(parts.values()), "accepted draft": parts["vision"] + drafted}

    def chunk(self, passes: int) -> dict[str, float]:
        """Return the least times of vision and of the passes over the whole sequence, and in total."""
        horizon = self.config.action_horizon
        if self.action_head is not None:
            head = self.least(self.action_head, horizon)
        else:
            head = self.least(self.head, horizon * (self.config.action_dim or 0))
        language = self.least(self.language, self.prompt + num_new_tokens(self.config))
        parts = {"vision": self.see(), "chunk": passes * (language + head)}
        return parts | {"predict_action": sum(parts.values())}
