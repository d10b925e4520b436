"""Networks that OpenVLA-OFT adds to the language model: heads that predict actions, and projectors for other inputs.

Shapes: B batch, K actions of a chunk, A action dimensions, D width of the language model.
"""

import functools
import math

import torch
from torch import nn

from .configuration_openvla import OpenVLAConfig


HEAD_BLOCKS = 2
COSINE_OFFSET = 0.008
LARGEST_BETA = 0.999
LONGEST_PERIOD = 10000.0


class DefaultLinear(nn.Linear):
    """Linear layer with PyTorch's default initialisation instead of the language model's.

    The normal distribution of a language model would be far too wide for the many inputs of an action head.
    """


class InputProjector(nn.Module):
    """Project the robot's state, or one number of a noisy action, to one embedding of the language model."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.fc1 = DefaultLinear(features, width)
        self.fc2 = DefaultLinear(width, width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Project numbers (..., features) to (..., D)."""
        return self.fc2(nn.functional.gelu(self.fc1(values.to(self.fc1.bias.dtype))))


class ResidualBlock(nn.Module):
    """Layer norm, linear layer and ReLU, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = DefaultLinear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Transform hidden states (..., D)."""
        return hidden + nn.functional.relu(self.linear(self.norm(hidden)))


class ActionHead(nn.Module):
    """Predict the actions of a chunk, or their noise, from one hidden state for each dimension of each action."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        width, dims = config.text_config.hidden_size, config.action_dim
        assert dims is not None  # the config checks it
        self.action_dim = dims
        self.layer_norm1 = nn.LayerNorm(dims * width)
        self.fc1 = DefaultLinear(dims * width, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(HEAD_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = DefaultLinear(width, dims)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (B, K * A, D) to normalised actions or noise (B, K, A); the values are not clipped."""
        hidden = hidden.to(self.fc1.bias.dtype).reshape(len(hidden), -1, self.action_dim * hidden.shape[-1])
        hidden = nn.functional.relu(self.fc1(self.layer_norm1(hidden)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.fc2(self.layer_norm2(hidden))


def embed_time(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """Embed timesteps (B,) of the noise schedule as sines and cosines (B, D), float32."""
    half = width // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
    angles = timesteps[:, None].float() * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoiseSchedule:
    """Deterministic diffusion (DDIM) with squared-cosine betas, as OpenVLA-OFT configures it.

    Args:
        steps: Number of noise levels in training; level `steps - 1` is almost pure noise.
    """

    def __init__(self, steps: int):
        def signal(share: float) -> float:
            return math.cos((share + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

        betas = [min(1 - signal((i + 1) / steps) / signal(i / steps), LARGEST_BETA) for i in range(steps)]
        self.steps = steps
        self.betas = torch.tensor(betas, device="cpu")
        self.alphas_cumprod = (1 - self.betas).cumprod(0)

    def timesteps(self, count: int) -> list[int]:
        """Return `count` evenly spaced timesteps, the noisiest first; the last is 0.

        Raises:
            ValueError: `count` does not divide the number of training steps, so sampling would start from pure noise
                at a level that has less noise.
        """
        divisors = [i for i in range(1, self.steps + 1) if self.steps % i == 0]
        if not isinstance(count, int) or isinstance(count, bool) or count not in divisors:
            raise ValueError(
                f"`num_inference_steps` must divide the {self.steps} training steps (choose from "
                f"{', '.join(map(str, divisors))}), got {count!r}."
            )
        spacing = self.steps // count
        return [i * spacing for i in reversed(range(count))]

    def add_noise(self, actions: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mix actions (B, K, A) with noise at the levels given by `timesteps` (B,)."""
        signal = self.alphas_cumprod.to(actions)[timesteps.to(actions.device)][:, None, None]
        return signal.sqrt() * actions + (1 - signal).sqrt() * noise

    def remove_noise(self, noisy: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Remove the predicted noise (B, K, A) from noisy actions, and clip the result to [-1, 1]."""
        signal = self.alphas_cumprod.to(noisy)[timesteps.to(noisy.device)][:, None, None]
        return ((noisy - (1 - signal).sqrt() * noise) / signal.sqrt()).clamp(-1, 1)

    def step(self, noisy: torch.Tensor, noise: torch.Tensor, timestep: int, count: int) -> torch.Tensor:
        """Take noisy actions (B, K, A) from the level `timestep` to the next lower one of `count` levels.

        Where the estimated actions are clipped, the predicted noise stays as it is.
        """
        levels = torch.full((len(noisy),), timestep, device=noisy.device)
        actions = self.remove_noise(noisy, noise, levels)
        following = timestep - self.steps // count
        signal = self.alphas_cumprod[following].to(noisy) if following >= 0 else noisy.new_ones(())
        return signal.sqrt() * actions + (1 - signal).sqrt() * noise


@functools.cache
def noise_schedule(steps: int) -> NoiseSchedule:
    """Return the noise schedule for a number of training steps."""
    return NoiseSchedule(steps)


__all__ = ["ActionHead", "DefaultLinear", "InputProjector", "NoiseSchedule", "embed_time", "noise_schedule"]
