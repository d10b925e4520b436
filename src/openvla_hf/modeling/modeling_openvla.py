"""OpenVLA: two vision towers, a projector, and a causal language model that writes actions as tokens.

Shapes: B batch, P image patches, T tokens (image placeholders included), D width, V vocabulary,
A action dimensions, N action bins.
"""

import copy
import fnmatch
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    Dinov2WithRegistersModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import CONFIG_NAME, ModelOutput, cached_file, can_return_tuple, hf_api, logging

from .action_decoding import (
    ActionStream,
    ActionTokens,
    action_pass,
    append_prompt_suffix,
    compile_action_pass,
    decode_actions,
    insert_image_tokens,
    left_pad,
)
from .action_tokenizer import ActionTokenizer, action_dim, resolve_action_stats, unnormalize
from .adapter_loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, translate
from .configuration_openvla import AUTO_MAP, OpenVLAConfig
from .quantized_loading import missing_package, prepare_quantized, refuse_second, with_defaults
from .weight_mapping import register_conversions


STATISTICS_FILE = "dataset_statistics.json"
# What OpenVLA-OFT keeps beside weights that have the names of OpenVLA's.
OFT_FILES = ("action_head--*", "proprio_projector--*", "noisy_action_projector--*")
# Arguments that say which files of a repository are meant, and how to get them.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Seconds to wait for the Hub's list of a repository's files.
HUB_TIMEOUT = 10.0

logger = logging.get_logger(__name__)

register_conversions()


@dataclass
class OpenVLAModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `OpenVLAModel`.

    image_hidden_states: (B, P, D) projected patches of the images given with this call.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class OpenVLACausalLMOutputWithPast(ModelOutput):
    """Outputs of `OpenVLAForActionPrediction`.

    loss: Mean cross entropy over the labels that are not -100.
    logits: (B, T, V).
    image_hidden_states: (B, P, D) projected patches of the images given with this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class ActionPrediction:
    """What `predict_action(return_details=True)` gives; rows with fewer dimensions than the longest end in NaN.

    actions: (B, A) float64, in the robot's units.
    normalized_actions: (B, A) float64 in [-1, 1].
    token_ids: (B, A) int64.
    probabilities: (B, A, N) float32 over the bins, lowest value first; `ActionTokenizer.bin_values` names them.
    entropy: (B, A) float32, of these, in nats.
    forward_passes: How often the language model ran.
    """

    actions: np.ndarray
    normalized_actions: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    entropy: np.ndarray
    forward_passes: int


class OpenVLADinov2Tower(Dinov2WithRegistersModel):
    """DINOv2 without what OpenVLA never reads: the mask token and the final norm."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        mask_token = self.embeddings.mask_token
        del self.embeddings.mask_token
        self.embeddings.register_buffer("mask_token", torch.zeros_like(mask_token), persistent=False)
        self.layernorm = nn.Identity()


class OpenVLASiglipTower(SiglipVisionModel):
    """SigLIP without the final norm and the pooling head."""

    def __init__(self, config: PreTrainedConfig):
        config.vision_use_head = False
        super().__init__(config)
        self.post_layernorm = nn.Identity()


TOWERS: dict[str, type[PreTrainedModel]] = {
    "dinov2_with_registers": OpenVLADinov2Tower,
    "siglip_vision_model": OpenVLASiglipTower,
}


class OpenVLAPreTrainedModel(PreTrainedModel):
    """What the modules of OpenVLA share: how they attend, load and are initialised."""

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class OpenVLAVisionBackbone(OpenVLAPreTrainedModel):
    """The towers side by side, each built up to the block whose output is read."""

    main_input_name = "pixel_values"

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.featurizer = self._build_tower("featurizer", config.vision_config)
        if config.fused_vision_config is not None:
            self.fused_featurizer = self._build_tower("fused_featurizer", config.fused_vision_config)
        self.post_init()

    def _build_tower(self, name: str, tower_config: PreTrainedConfig) -> PreTrainedModel:
        tower_config = copy.deepcopy(tower_config)
        published_layers = tower_config.num_hidden_layers
        tower_config.num_hidden_layers = self.config.vision_layers_built(tower_config)
        # Stored in published checkpoints and never read.
        above = "|".join(str(i) for i in range(tower_config.num_hidden_layers, published_layers))
        unread = rf"vision_backbone\.{name}\.(norm\.|attn_pool\." + (
            rf"|encoder\.layers?\.({above})\.)" if above else ")"
        )
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), unread}  # type: ignore[has-type]
        tower_class = TOWERS.get(tower_config.model_type)
        return AutoModel.from_config(tower_config) if tower_class is None else tower_class(tower_config)

    @property
    def towers(self) -> list[PreTrainedModel]:
        """The towers in the order of their channels in `pixel_values`."""
        return [self.featurizer] + ([self.fused_featurizer] if self.config.fused_vision_config is not None else [])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3 * towers, H, W) -> (B, P, sum of the towers' widths): patch tokens only, no final norm."""
        channels = 3 * len(self.towers)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {channels}, height, width) for {len(self.towers)} vision tower(s), "
                f"got {tuple(pixel_values.shape)}: make it with this checkpoint's own processor."
            )
        features = []
        for tower, pixels in zip(self.towers, pixel_values.split(3, dim=1), strict=True):
            if isinstance(tower, tuple(TOWERS.values())):
                tokens = tower(pixel_values=pixels).last_hidden_state  # type: ignore[operator]
            else:  # its final norm is still there: read what comes before it
                tokens = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
            # Class and register tokens come first.
            features.append(tokens[:, -self.config.num_image_tokens :])
        return torch.cat(features, dim=-1)


class OpenVLAProjector(nn.Module):
    """Vision features -> embeddings of the language model: three layers for fused towers, two for one."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        vision_width = sum(vision_config.hidden_size for vision_config in config.vision_configs)
        text_width = config.text_config.hidden_size
        fused = config.fused_vision_config is not None
        first_width = 4 * vision_width if fused else text_width
        self.fc1 = nn.Linear(vision_width, first_width)
        self.fc2 = nn.Linear(first_width, text_width)
        self.fc3 = nn.Linear(text_width, text_width) if fused else None
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, P, vision width) -> (B, P, D)."""
        hidden = self.fc2(self.act(self.fc1(features)))
        return hidden if self.fc3 is None else self.fc3(self.act(hidden))


class OpenVLAModel(OpenVLAPreTrainedModel):
    """Vision backbone, projector and language model, without the head."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3 * towers, H, W) -> (B, P, D), one embedding for each patch."""
        return self.projector(self.vision_backbone(pixel_values.to(self.projector.fc1.bias.dtype)))

    def _place_image(
        self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        placeholders = (input_ids == self.config.image_token_id).unsqueeze(-1).to(inputs_embeds.device)
        return inputs_embeds.masked_scatter(placeholders, image_features.to(inputs_embeds))

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) ids with their placeholders, and images, to (B, T, D); unlike `forward`, nothing is checked."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return inputs_embeds
        return self._place_image(inputs_embeds, input_ids, self.get_image_features(pixel_values))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OpenVLAModelOutputWithPast:
        """Scatter the image over its placeholders in `input_ids` (B, T) and run the language model."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("`pixel_values` need `input_ids`, whose image placeholders say where they go.")
            image_features = self.get_image_features(pixel_values).to(inputs_embeds)
            placeholders = input_ids == self.config.image_token_id
            # Looked at outside a compiled graph only: the check would break it.
            if not torch.compiler.is_compiling() and int(placeholders.sum()) != image_features[..., 0].numel():
                raise ValueError(
                    f"`input_ids` must hold {image_features.shape[1]} image placeholders (id "
                    f"{self.config.image_token_id}) for each image: found {int(placeholders.sum())} for "
                    f"{image_features.shape[0]} images."
                )
            inputs_embeds = self._place_image(inputs_embeds, input_ids, image_features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return OpenVLAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class OpenVLAForActionPrediction(OpenVLAPreTrainedModel, GenerationMixin):
    """The policy: `predict_action` turns an image and an instruction into an action in the robot's units.

    Example:
        ```python
        model = AutoModel.from_pretrained("openvla/openvla-7b", dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained("openvla/openvla-7b")
        inputs = processor(image, instruction="pick up the red block")
        action = model.predict_action(**inputs, unnorm_key="bridge_orig")
        ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.model = OpenVLAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.action_pass: Callable[..., tuple[torch.Tensor, torch.Tensor]] = action_pass
        self.action_caches: dict[tuple, Cache] = {}  # one, for the next call of the same size
        self.post_init()

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, for published checkpoints and our own.

        Unless a `quantization_config` says what stays in 16 bits, the head, the towers and the projector do. Weights
        are read from safetensors alone: a pickled file could run code.

        Raises:
            ValueError: A weight is missing or has no place here, the checkpoint is an OpenVLA-OFT one, or it is
                quantised already and `quantization_config` is given.
            OSError: A weights file is absent or can't be read.
            ImportError: The package that the quantised weights need is not installed.
        """
        adapter, pretrained_model_name_or_path, kwargs = cls._resolve_adapter(pretrained_model_name_or_path, kwargs)
        cls._refuse_oft(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None:
            stored = cls._stored_quantization(pretrained_model_name_or_path, **kwargs)
            refuse_second(pretrained_model_name_or_path, stored)
            kwargs["quantization_config"] = with_defaults(kwargs["quantization_config"])
        kwargs["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise cls.unreadable_weights(pretrained_model_name_or_path, error) from error
        except OSError as error:
            if "no file named" not in str(error):
                raise
            raise OSError(
                f"{error} Copy the weights beside the config, or download the repository again: it is not complete."
            ) from error
        except ModuleNotFoundError as error:
            raise missing_package(pretrained_model_name_or_path, error) or error from error
        cls.refuse_foreign_weights(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        if not model.norm_stats:
            model.norm_stats = cls._read_statistics(pretrained_model_name_or_path, **kwargs)
        prepare_quantized(model)
        if adapter is not None:
            model.load_adapter(adapter["repo"], **adapter["hub_kwargs"])
        return (model, info) if output_loading_info else model

    @classmethod
    def _resolve_adapter(cls, repo: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any] | None, Any, dict[str, Any]]:
        """What `from_pretrained` was given as an adapter (or `None`), its base, and the arguments for the base.

        The Auto classes name the base and hide the adapter in `adapter_kwargs`.
        """
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        hub_kwargs = {name: adapter_kwargs[name] for name in HUB_KWARGS if adapter_kwargs.get(name) is not None}
        given = adapter_kwargs.get("_adapter_model_path")
        if given is not None:
            return {"repo": given, "hub_kwargs": hub_kwargs}, repo, kwargs
        config_file = cls._find_file(repo, ADAPTER_CONFIG, **kwargs)
        if config_file is None or cls._find_file(repo, CONFIG_NAME, **kwargs) is not None:
            return None, repo, kwargs
        base = json.loads(Path(config_file).read_text(encoding="utf-8")).get("base_model_name_or_path")
        beside = Path(config_file).parent / str(base)
        base = str(beside) if beside.is_dir() else base
        if not base or (str(base).startswith((".", "/")) and not os.path.isdir(base)):
            raise OSError(
                f"{repo} is an adapter whose base {base!r} is not here: load the base yourself, and then the adapter "
                "with `openvla_hf.load_adapter(model, adapter)`."
            )
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        of_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        return {"repo": repo, "hub_kwargs": hub_kwargs}, base, of_base

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """As transformers' own; takes adapters of the original's layer names too, and the statistics beside them.

        Raises:
            ValueError: A weight finds no place in this model, or an adapted layer lacks one.
            OSError: There is no adapter, or its weights are not in a safetensors file.
        """
        if kwargs.get("adapter_state_dict") is not None:
            return super().load_adapter(peft_model_id, adapter_name, **kwargs)
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
        config_file = self._find_file(peft_model_id, ADAPTER_CONFIG, **hub_kwargs)
        weights_file = self._find_file(peft_model_id, ADAPTER_WEIGHTS, **hub_kwargs)
        if config_file is None or weights_file is None:
            raise OSError(f"{peft_model_id} holds no adapter: it lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}.")
        with tempfile.TemporaryDirectory() as folder:
            whole = translate(self, config_file, weights_file, Path(folder))
            for layer, weight in whole.items():
                self.get_submodule(layer).weight.data.copy_(weight)
            info = super().load_adapter(folder, adapter_name, **kwargs)
        problems = info.missing_keys | info.unexpected_keys | {key for key, *_ in info.mismatched_keys}
        if problems:
            raise ValueError(
                f"{peft_model_id} does not fit this model: {len(problems)} weights are missing, left over or of "
                f"another shape, such as {min(problems)!r}."
            )
        self.norm_stats = self._read_statistics(peft_model_id, **hub_kwargs) or self.norm_stats
        return info

    @staticmethod
    def unreadable_weights(repo: Any, error: SafetensorError) -> OSError:
        """A sentence in place of `error`."""
        return OSError(
            f"A weights file of {repo} is corrupt or was cut short ({error}): download it again, with "
            "`force_download=True` if it comes from the Hub."
        )

    @staticmethod
    def refuse_foreign_weights(repo: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """`ValueError` where a checkpoint lacks weights, or has some that have no place here."""
        for problem, names in (("missing", missing), ("unexpected", unexpected)):
            if keys := sorted(names):
                raise ValueError(
                    f"{repo} is no OpenVLA checkpoint that this class can load: {len(keys)} {problem} weights, such "
                    f"as {keys[0]!r}. An OpenVLA-OFT checkpoint needs the code of OpenVLA-OFT."
                )

    @staticmethod
    def _find_file(repo: str | os.PathLike | None, name: str, **kwargs: Any) -> str | None:
        """Path of a file beside the weights, or `None`."""
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        if repo is None:  # `state_dict=` is given instead
            return None
        return cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    @classmethod
    def _list_files(cls, repo: str | os.PathLike | None, **kwargs: Any) -> list[str]:
        """Names of the files beside the config, with one request at most where `repo` is on the Hub."""
        if repo is None:  # `state_dict=` is given instead
            return []
        if not os.path.isdir(repo) and not kwargs.get("local_files_only"):
            # Unlike a listing of the tree, this does not try again and again while there is no network.
            try:
                info = hf_api().model_info(
                    str(repo), revision=kwargs.get("revision"), token=kwargs.get("token"), timeout=HUB_TIMEOUT
                )
            except Exception:  # offline, gated, no such repository: loading itself copes or says it best
                logger.debug("Could not list the files of %s.", repo, exc_info=True)
            else:
                folder = PurePosixPath(kwargs.get("subfolder") or "")
                paths = [PurePosixPath(file.rfilename) for file in info.siblings or []]
                return [path.name for path in paths if path.parent == folder]
        config_file = cls._find_file(repo, CONFIG_NAME, **kwargs)
        return [] if config_file is None else os.listdir(Path(config_file).parent)

    @classmethod
    def _refuse_oft(cls, repo: str | os.PathLike | None, **kwargs: Any) -> None:
        """An OpenVLA-OFT checkpoint would load, and act wrongly: its action head is in a file of its own."""
        names = cls._list_files(repo, **kwargs)
        if found := sorted(name for pattern in OFT_FILES for name in fnmatch.filter(names, pattern)):
            raise ValueError(
                f"{repo} is an OpenVLA-OFT checkpoint (it holds {found[0]!r}), whose action head this class does not "
                "have: run it with the code of OpenVLA-OFT."
            )

    @classmethod
    def _read_statistics(cls, repo: str | os.PathLike | None, **kwargs: Any) -> dict[str, Any] | None:
        """Statistics that a fine-tuning run left beside the weights, or `None`."""
        path = cls._find_file(repo, STATISTICS_FILE, **kwargs)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def _stored_quantization(cls, repo: str | os.PathLike | None, **kwargs: Any) -> Any:
        """How the stored weights are quantised, or `None`."""
        config = kwargs.get("config")
        if config is not None:
            return getattr(config, "quantization_config", None)
        path = cls._find_file(repo, CONFIG_NAME, **kwargs)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8")).get("quantization_config")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`: our weight names, the code, and the statistics as a file too."""
        self.config.auto_map = dict(AUTO_MAP)
        kwargs.setdefault("save_original_format", False)
        if self.norm_stats and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            with open(os.path.join(save_directory, STATISTICS_FILE), "w", encoding="utf-8") as file:
                json.dump(self.norm_stats, file, indent=2)
        super().save_pretrained(save_directory, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head

    # Statistics

    @property
    def norm_stats(self) -> dict[str, Any] | None:
        """`{key: {"action": {"q01", "q99", "mask", ...}, ...}}` of every data set the checkpoint knows."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, value: dict[str, Any] | None) -> None:
        self.config.norm_stats = value

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Action statistics of one data set; `ValueError` when the key does not name one."""
        return resolve_action_stats(self.norm_stats, unnorm_key)

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Number of action dimensions of one data set."""
        return action_dim(self.get_action_stats(unnorm_key))

    @property
    def action_tokenizer(self) -> ActionTokenizer:
        """Bins <-> ids of this checkpoint."""
        return ActionTokenizer(self.config.action_vocab_end, self.config.n_action_bins)

    def decode_actions(self, token_ids: torch.Tensor | np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Action ids (..., A) -> actions in the robot's units, float64 of the same shape."""
        return unnormalize(self.action_tokenizer.decode(token_ids), self.get_action_stats(unnorm_key))

    # Running

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3 * towers, H, W) -> (B, P, D), one embedding for each patch."""
        return self.model.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> OpenVLACausalLMOutputWithPast:
        """Logits (B, T, V), and the loss where `labels` (B, T; -100 is ignored) are given.

        `input_ids` without image placeholders (from the original processor) get them after BOS. `logits_to_keep` says
        which positions get logits: the last so many, an index of positions, or (B, K), each row's own.
        """
        if pixel_values is not None and input_ids is not None:
            input_ids, attention_mask, labels = insert_image_tokens(self.config, input_ids, attention_mask, labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            hidden = hidden.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return OpenVLACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`; ids without image placeholders get them, and the output keeps them."""
        input_ids = inputs if input_ids is None else input_ids
        if pixel_values is not None:
            input_ids, attention_mask, _ = insert_image_tokens(self.config, input_ids, attention_mask)
            kwargs["pixel_values"] = pixel_values
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        stats: dict[str, Any] | None = None,
        constrained: bool = True,
        return_details: bool = False,
        draft_token_ids: torch.Tensor | np.ndarray | None = None,
        **decoding: Any,
    ) -> np.ndarray | ActionPrediction:
        """Predict the action for one observation or a batch.

        Args:
            input_ids: (B, T) prompts, with or without image placeholders, padded on either side.
            pixel_values: (B, 3 * towers, H, W).
            attention_mask: (B, T); all ones when left out.
            unnorm_key: Whose statistics turn the action into robot units; a list gives each row its own.
            stats: Action statistics (`q01`, `q99`, `mask`) to use in place of the checkpoint's.
            constrained: Choose among the action ids only. `False` takes the best of the whole vocabulary and
                clips what is no action to an end, as the original code does.
            return_details: Give an `ActionPrediction`, with a batch dimension always.
            draft_token_ids: (B, A) or (A,) ids that the action may well have, such as the last action's. The result
                is the same; the closer they come, the fewer passes of the language model it takes.
            decoding: Arguments of `generate` (`do_sample`, `temperature`, ...); greedy by default.

        Returns:
            float64 (A,) for one observation, (B, A) for a batch, in the units of the statistics.

        Raises:
            ValueError: The statistics can't be resolved, or images and prompts differ in number.
        """
        # 1. Whose action is it
        rows = len(input_ids)
        if len(pixel_values) != rows:
            raise ValueError(f"Got {len(pixel_values)} images for {rows} prompts: give one image with each prompt.")
        keys = unnorm_key if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * rows
        if len(keys) != rows:
            raise ValueError(f"Got {len(keys)} `unnorm_key`s for {rows} observations: give one, or one for each.")
        row_stats = [stats or self.get_action_stats(key) for key in keys]
        dims = [action_dim(one) for one in row_stats]
        # 2. Inputs where and how the model wants them: placeholders, prompt suffix, padding on the left
        # (they are looked at for that, so ids that come from the CPU go to the device afterwards)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        input_ids, attention_mask = left_pad(input_ids, attention_mask)
        input_ids, attention_mask = append_prompt_suffix(self.config, input_ids, attention_mask)
        input_ids, attention_mask, _ = insert_image_tokens(self.config, input_ids, attention_mask)
        assert attention_mask is not None  # one went in
        # 3. Ids of the action, one for each dimension
        tokens: ActionTokens = decode_actions(
            self,
            input_ids.to(self.device),
            pixel_values.to(self.device, self.dtype),
            attention_mask.to(self.device),
            dims,
            constrained=constrained,
            draft_token_ids=draft_token_ids,
            **decoding,
        )
        # 4. Ids to bins to robot units
        token_ids = tokens.token_ids.cpu().numpy()
        normalized = self.action_tokenizer.decode(token_ids)
        actions = np.full(normalized.shape, np.nan)
        for row, (one, dim) in enumerate(zip(row_stats, dims, strict=True)):
            normalized[row, dim:] = np.nan
            actions[row, :dim] = unnormalize(normalized[row, :dim], one)
        if not return_details:
            return actions[0] if rows == 1 else actions
        log_probabilities = tokens.action_logits.float().log_softmax(-1)
        return ActionPrediction(
            actions=actions,
            normalized_actions=normalized,
            token_ids=token_ids,
            probabilities=log_probabilities.exp().cpu().numpy(),
            entropy=-(log_probabilities.exp() * log_probabilities).sum(-1).cpu().numpy(),
            forward_passes=tokens.forward_passes,
        )

    def action_stream(self, unnorm_key: str | list[str] | None = None) -> ActionStream:
        """A control loop's `predict_action`: each action's tokens are the draft of the next."""
        return ActionStream(self, unnorm_key)

    def compile_for_actions(self, mode: str | None = None) -> None:
        """Compile the passes of `predict_action`, with CUDA graphs on a GPU; the first call of each size compiles.

        Prompts are padded to a few lengths, so that all instructions share a few graphs. Where compilation fails, the
        first call warns and the model goes on without. Without this nothing is compiled.

        Args:
            mode: Of `torch.compile`; by default "reduce-overhead" (CUDA graphs) on a GPU, its own default elsewhere.
        """
        mode = mode or ("reduce-overhead" if self.device.type == "cuda" else "default")
        self.action_pass, self.action_caches = compile_action_pass(mode), {}


OpenVLAForActionPrediction.register_for_auto_class("AutoModel")

__all__ = [
    "ActionPrediction",
    "OpenVLAForActionPrediction",
    "OpenVLAModel",
    "OpenVLAPreTrainedModel",
    "OpenVLAVisionBackbone",
]
