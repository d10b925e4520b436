"""OpenVLA as LeRobot's policy `openvla`. The model, the processor and the statistics are openvla-hf's.

Shapes: B rows, n actions to execute, K actions of a chunk, A action dimensions, S state dimensions.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE

from openvla_hf.modeling.action_networks import add_action_networks, list_networks
from openvla_hf.modeling.action_tokenizer import resolve_key
from openvla_hf.serving.policy import Observation, ServedPolicy, Session
from openvla_hf.training.collator import ActionCollator, ChunkCollator
from openvla_hf.training.recipes import LINEAR_LAYERS
from openvla_hf.training.recipes import recipe as find_recipe

from .configuration_openvla import OpenVLAConfig
from .statistics import read_statistics, summarize_dataset, to_opening


CHECKPOINT_FOLDER = "openvla"
"""Folder of an OpenVLA checkpoint within a checkpoint of LeRobot."""
PREFIX = "model."
"""Prefix of OpenVLA's weights in the state dict of the policy."""
IMAGES = "observation.image"
"""Beginning of LeRobot's names of images."""
PADDING = "_is_pad"
"""End of LeRobot's names of masks, true for steps beyond the end of an episode."""


class OpenVLAPolicy(PreTrainedPolicy):
    """OpenVLA or OpenVLA-OFT.

    Args:
        config: Configuration.
        checkpoint: Folder of the OpenVLA checkpoint, instead of the configuration's `checkpoint`.
        dataset_stats: LeRobot's statistics of the dataset to train on; `None` for a policy that only predicts.
        dataset_meta: Metadata of that dataset, for its name.
        ignored: Other arguments that LeRobot passes to policies.

    Raises:
        ValueError: The configuration does not fit the checkpoint or the dataset.
    """

    config_class = OpenVLAConfig
    name = "openvla"

    def __init__(
        self,
        config: OpenVLAConfig,
        *,
        checkpoint: str | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        **ignored: Any,
    ):
        super().__init__(config)
        if not (checkpoint or config.checkpoint):
            raise ValueError(
                "The policy has no OpenVLA checkpoint: give its folder or Hub id as `--policy.checkpoint`."
            )
        loaded = ServedPolicy.load(
            checkpoint or config.checkpoint,
            revision=None if checkpoint else config.checkpoint_revision,
            dtype=config.dtype,
            loading=None if config.platform is None or checkpoint else {"platform": config.platform},
        )
        self.model, self.processor = loaded.model, loaded.processor
        if dataset_stats is not None:
            self._choose_statistics(dataset_stats, dataset_meta)
        if config.statistics is not None:
            self.model.norm_stats = {config.unnorm_key: read_statistics(config.statistics)}
        is_trained = dataset_stats is not None
        if config.action_head is not None:
            self._add_head(is_new=is_trained or config.use_peft)
        self._check_chunk_size(is_trained)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.served = ServedPolicy(
            self.model,
            self.processor,
            config.checkpoint,
            unnorm_key=config.unnorm_key,
            gripper=config.gripper,
            execute=config.n_action_steps,
            ensemble=config.temporal_ensemble_coeff,
        )
        self.collator = self._build_collator() if is_trained else None
        self.reset()

    # Setup

    def _choose_statistics(self, dataset_stats: Mapping[str, Mapping[str, Any]], dataset_meta: Any) -> None:
        """Keep the statistics of the checkpoint that the configuration names, or use those of the dataset."""
        config = self.config
        if config.unnorm_key is not None and config.statistics is None:
            resolve_key(self.model.norm_stats, config.unnorm_key)  # raises if unknown
            return
        config.statistics = summarize_dataset(dataset_stats, config.gripper)
        config.unnorm_key = "dataset" if dataset_meta is None else dataset_meta.repo_id

    def _add_head(self, is_new: bool) -> None:
        """Add the networks of the configuration's action head, with random weights, unless the policy has them."""
        config, has = self.config, self.model.config
        if has.is_parallel and has.action_head == config.action_head:
            return
        if not is_new:
            raise ValueError(
                f"`action_head={config.action_head!r}` makes a new head, which must be trained first: leave it out to "
                "use the checkpoint as it is."
            )
        statistics = self.model.norm_stats[resolve_key(self.model.norm_stats, config.unnorm_key)]
        if config.use_state and "proprio" not in statistics:
            raise ValueError("The dataset has no 'observation.state': leave out `use_state`.")
        recipe = find_recipe(
            "oft", action_head=config.action_head, action_horizon=config.chunk_size, use_state=config.use_state
        )
        names = list(config.cameras) or [_camera_name(key) for key in config.image_features]
        state_dim = len(statistics["proprio"]["q01"]) if config.use_state else None
        fields = recipe.action_fields(len(statistics["action"]["q01"]), len(names), state_dim)
        add_action_networks(self.model, fields, "`action_head`")
        self.processor.state_dim = state_dim
        self.processor.cameras = names if len(names) > 1 else None

    def _check_chunk_size(self, is_trained: bool) -> None:
        """Compare the configuration's chunks, which LeRobot reads from the dataset, with the policy's."""
        horizon = self.model.config.action_horizon if self.model.config.is_parallel else 1
        given = self.config.chunk_size
        if (given or (1 if is_trained else horizon)) != horizon:
            raise ValueError(
                f"The policy predicts {horizon} actions at a time, but `chunk_size` is {given}: set "
                f"`--policy.chunk_size={horizon}`."
            )
        self.config.chunk_size = horizon

    def _build_collator(self) -> ActionCollator:
        config = self.model.config
        key = resolve_key(self.model.norm_stats, self.config.unnorm_key)
        shared: dict[str, Any] = {
            "processor": self.processor,
            "action_tokenizer": self.model.action_tokenizer,
            "prompt_suffix_token_id": config.prompt_suffix_token_id,
            "norm_stats": {key: self.model.norm_stats[key]},
        }
        if config.is_parallel:
            return ChunkCollator(config, **shared)
        return ActionCollator(normalization=config.action_normalization, **shared)

    # Prediction

    def reset(self) -> None:
        """Start new episodes."""
        self._sessions: list[Session] = []
        self._planned: deque[torch.Tensor] = deque()

    def select_action(self, batch: dict[str, Any], **ignored: Any) -> torch.Tensor:
        """Return the next action (B, A) of each row, and predict when the last chunk has been executed."""
        if not self._planned:
            self._planned.extend(self.predict_action_chunk(batch).unbind(1))
        return self._planned.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **ignored: Any) -> torch.Tensor:
        """Predict the actions (B, n, A) to execute before the next prediction, with the robot's gripper.

        Raises:
            ValueError: The observations do not fit the policy.
        """
        images, states = self._read_images(batch), self._read_states(batch)
        if len(self._sessions) != len(batch["task"]):
            self._sessions = [self.served.open_session() for _ in batch["task"]]
        prepared = [
            self.served.prepare(
                session.observe(
                    Observation(
                        {camera: rows[row] for camera, rows in images.items()},
                        batch["task"][row],
                        None if states is None else states[row],
                    )
                )
            )
            for row, session in enumerate(self._sessions)
        ]
        predictions = self.served.predict(prepared)
        actions = [session.receive(one) for session, one in zip(self._sessions, predictions, strict=True)]
        return torch.from_numpy(np.stack(actions)).to(self.config.device, torch.float32)

    def _read_images(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the images of each of the policy's cameras, uint8 (B, H, W, 3)."""
        keys = [key for key in batch if key.startswith(IMAGES) and not key.endswith(PADDING)]
        by_name = {_camera_name(key): key for key in keys}
        cameras = self.served.cameras
        if len(keys) == len(cameras) == 1:
            by_name = {cameras[0]: keys[0]}
        images = {}
        for camera in cameras:
            key = self.config.cameras.get(camera, by_name.get(camera))
            if key not in keys:
                raise ValueError(
                    f"The observation has no image for the policy's camera {camera!r}; its images are "
                    f"{', '.join(map(repr, keys)) or 'none'}. Name the image, such as "
                    f"`--policy.cameras='{{{camera}: {keys[0] if keys else 'observation.images.top'}}}'`."
                )
            images[camera] = _to_uint8(batch[key])
        return images

    def _read_states(self, batch: Mapping[str, Any]) -> np.ndarray | None:
        """Return the states (B, S), or `None` if the policy does not see them."""
        if self.served.state_dim is None:
            return None
        if OBS_STATE not in batch:
            raise ValueError(f"The observation has no {OBS_STATE!r}, but this policy sees the robot's state.")
        return batch[OBS_STATE].double().cpu().numpy()

    # Training

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the loss of the actions (B, K, A) of a dataset.

        Raises:
            ValueError: The policy was not made for training, or the batch does not fit it.
        """
        if self.collator is None:
            raise ValueError("This policy was made without the statistics of a dataset, so it only predicts.")
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in self.collator(self._read_frames(batch)).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        del inputs["dataset_index"]
        if self.model.config.is_parallel:
            del inputs["labels"]
        return self.model(**inputs).loss, {}

    def _read_frames(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a batch as frames of openvla-hf."""
        images, states = self._read_images(batch), self._read_states(batch)
        actions = batch[ACTION].double().cpu().numpy()
        actions[..., -1] = to_opening(actions[..., -1], self.config.gripper)
        ends = batch[ACTION + PADDING].cpu().numpy()
        frames = []
        for row, instruction in enumerate(batch["task"]):
            frame = {"images": {camera: rows[row] for camera, rows in images.items()}, "instruction": instruction}
            if states is not None:
                frame["state"] = states[row]
            if self.model.config.is_parallel:
                frame |= {"actions": actions[row], "chunk_mask": ~ends[row]}
            else:
                frame["action"] = actions[row, 0]
            frames.append(frame)
        return frames

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters, in float32: optimizer steps are too small for bfloat16."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        return trained

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """Adapt all linear layers, and train the networks of an action head in full."""
        return {"target_modules": list(LINEAR_LAYERS), "modules_to_save": list_networks(self.model) or None}

    # Checkpoints

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write LeRobot's configuration, and beside it a complete OpenVLA checkpoint in a folder of its own."""
        self.config._save_pretrained(save_directory)
        if state_dict is not None:
            state_dict = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        self.model.save_pretrained(save_directory / CHECKPOINT_FOLDER, state_dict=state_dict)
        self.processor.save_pretrained(save_directory / CHECKPOINT_FOLDER)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: OpenVLAConfig | None = None,
        revision: str | None = None,
        dataset_stats: Mapping[str, Mapping[str, Any]] | None = None,
        dataset_meta: Any = None,
        **hub: Any,
    ) -> "OpenVLAPolicy":
        """Load a checkpoint that LeRobot wrote.

        Args:
            pretrained_name_or_path: Folder or Hub id. If it contains no weights, those of the configuration's
                `checkpoint` are loaded.
            config: Configuration, instead of the checkpoint's.
            revision: Branch, tag or commit of a Hub id.
            dataset_stats: As in the constructor.
            dataset_meta: As in the constructor.
            hub: `token`, `cache_dir`, `force_download` and `local_files_only` of huggingface_hub.
        """
        hub = {name: hub[name] for name in ("token", "cache_dir", "force_download", "local_files_only") if name in hub}
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision, **hub)
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            pattern = f"{CHECKPOINT_FOLDER}/*"
            name = str(pretrained_name_or_path)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=pattern, **hub))
        inside = folder / CHECKPOINT_FOLDER
        policy = cls(
            config,
            checkpoint=str(inside) if inside.is_dir() else None,
            dataset_stats=dataset_stats,
            dataset_meta=dataset_meta,
        )
        return policy.to(config.device).eval()


def _camera_name(key: str) -> str:
    """Return the last part of LeRobot's name of images."""
    return key.rpartition(".")[2]


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert images (B, 3, H, W) from 0 to 1, or uint8, to uint8 (B, H, W, 3)."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


__all__ = ["OpenVLAPolicy"]
