"""The options of the policy `openvla`."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig


@PreTrainedConfig.register_subclass("openvla")
@dataclass
class OpenVLAConfig(PreTrainedConfig):
    """Configuration of OpenVLA or OpenVLA-OFT.

    Args:
        checkpoint: Folder or Hub id of an OpenVLA checkpoint. LeRobot's own checkpoints of this policy contain one.
        checkpoint_revision: Branch, tag or commit of a Hub id.
        platform: Robot of a published OpenVLA-OFT checkpoint: "libero", "aloha" or "bridge".
        dtype: Data type of the weights: "auto" for that of the checkpoint, "bfloat16" or "float32". With "bfloat16",
            LeRobot trains with mixed precision.
        unnorm_key: Name of the checkpoint's statistics. Training computes new ones if it is `None`.
        gripper: Values of the last action dimension: "policy" as OpenVLA predicts it (1 open, 0 closed), "binary" (the
            same, rounded) or "libero" (-1 open, 1 closed).
        cameras: Camera of the policy -> LeRobot's name of its images, such as `{"full_image":
            "observation.images.image"}`. Not needed if there is one of each, or if the names agree.
        chunk_size: Number of actions that the policy predicts. Training a policy that predicts chunks needs it.
        n_action_steps: Number of actions of a chunk to execute before the next prediction; all by default.
        temporal_ensemble_coeff: Decay of temporal ensembling, which predicts at each step.
        action_head: Give a plain OpenVLA a new head that predicts chunks of `chunk_size` actions, as OpenVLA-OFT does:
            "l1", "diffusion" or "none" (action tokens). `None` keeps the checkpoint's.
        use_state: Whether a policy with a new `action_head` sees the robot's state.
        gradient_checkpointing: Whether to compute the activations again in the backward pass, which saves memory.
        optimizer_lr: Learning rate.
        optimizer_weight_decay: Weight decay of AdamW.
        optimizer_grad_clip_norm: Norm to which gradients are clipped; 0 for no clipping.
        statistics: Statistics of the dataset that the policy was trained on. Training fills them in.
    """

    checkpoint: str = ""
    checkpoint_revision: str | None = None
    platform: str | None = None
    dtype: str = "auto"
    unnorm_key: str | None = None
    gripper: str = "policy"
    cameras: dict[str, str] = field(default_factory=dict)
    chunk_size: int | None = None
    n_action_steps: int | None = None
    temporal_ensemble_coeff: float | None = None
    action_head: str | None = None
    use_state: bool = False
    gradient_checkpointing: bool = False
    optimizer_lr: float = 2e-5
    optimizer_weight_decay: float = 0.0
    optimizer_grad_clip_norm: float = 1.0
    statistics: dict[str, dict[str, list[float]]] | None = None
    # OpenVLA normalises actions and states itself, with its own statistics.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_head is not None and self.chunk_size is None:
            raise ValueError("A new `action_head` needs `chunk_size`, the number of actions to predict, such as 8.")

    def validate_features(self) -> None:
        """Require a camera.

        Raises:
            ValueError: There are no images.
        """
        if not self.image_features:
            raise ValueError("OpenVLA needs the images of a camera, but the data has none.")

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return AdamW."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """Return no scheduler: the learning rate is constant."""
        return None

    @property
    def observation_delta_indices(self) -> None:
        """No past observations."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The steps of a chunk."""
        return list(range(self.chunk_size or 1))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None


__all__ = ["OpenVLAConfig"]
