"""Configuration of OpenVLA: one or two vision towers, a causal language model, and the action statistics."""

from typing import Any

import transformers


MINIMUM_TRANSFORMERS = (5, 20)

# Checked before anything newer is imported, so that an old installation gets this clear error.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"This OpenVLA needs transformers >= {'.'.join(map(str, MINIMUM_TRANSFORMERS))}, "
        f"but {transformers.__version__} is installed: run `pip install -U transformers`."
    )

from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2CLS  # noqa: E402
from transformers.configuration_utils import SubConfigSpec  # noqa: E402

from .action_tokenizer import ActionTokenizer  # noqa: E402
from .known_names import check_name  # noqa: E402


def _dinov2(image_size: int) -> dict[str, Any]:
    return {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": 14,
    }


def _siglip(image_size: int, base: bool = False) -> dict[str, Any]:
    widths = (768, 3072, 12, 12, 16) if base else (1152, 4304, 27, 16, 14)
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, patch_size = widths
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        # OpenVLA's SigLIP runs the exact (erf) GELU, not the tanh approximation that is the default.
        "hidden_act": "gelu",
        "vision_use_head": False,
    }


# `vision_backbone_id` of a published checkpoint -> (vision_config, fused_vision_config)
PUBLISHED_VISION_BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "dinosiglip-vit-so-224px": (_dinov2(224), _siglip(224)),
    "dinosiglip-vit-so-384px": (_dinov2(384), _siglip(384)),
    "dinov2-vit-l": (_dinov2(224), None),
    "siglip-vit-so400m": (_siglip(224), None),
    "siglip-vit-so400m-384px": (_siglip(384), None),
    "siglip-vit-b16-224px": (_siglip(224, base=True), None),
    "siglip-vit-b16-256px": (_siglip(256, base=True), None),
    "siglip-vit-b16-384px": (_siglip(384, base=True), None),
}

# A published `text_config` contains only the differences from the LlamaConfig of transformers 4.40.1. The defaults of
# that version are repeated here, so that later defaults do not change the model.
PUBLISHED_TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32064,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# Fields of published configs that are converted to our own fields.
PUBLISHED_ONLY_FIELDS = (
    "vision_backbone_id",
    "llm_backbone_id",
    "arch_specifier",
    "use_fused_vision_backbone",
    "timm_model_ids",
    "timm_override_act_layers",
    "image_sizes",
    "image_resize_strategy",
    "hf_llm_id",
    "llm_max_length",
    "output_projector_states",
)

# Fields that a plain OpenVLA checkpoint leaves at their defaults.
OFT_FIELDS = (
    "num_images",
    "action_decoding",
    "action_head",
    "action_horizon",
    "action_dim",
    "proprio_dim",
    "action_normalization",
    "use_film",
    "diffusion_steps",
    "action_stop_token",
)
ACTION_CHOICES = {
    "action_decoding": ("autoregressive", "parallel"),
    "action_head": ("none", "l1", "diffusion"),
    "action_normalization": ("q99", "bounds"),
}
# Language models that follow a bidirectional mask in every attention implementation. Others may add a causal mask of
# their own.
BIDIRECTIONAL_LANGUAGE_MODELS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
)

AUTO_MAP = {
    "AutoConfig": "configuration_openvla.OpenVLAConfig",
    "AutoModel": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForImageTextToText": "modeling_openvla.OpenVLAForActionPrediction",
    # transformers 5 dropped this Auto class; older versions look up this key.
    "AutoModelForVision2Seq": "modeling_openvla.OpenVLAForActionPrediction",
}


class OpenVLAConfig(PreTrainedConfig):
    r"""Configuration of an OpenVLA model.

    Args:
        vision_config: The first vision tower (DINOv2 in the fused model, SigLIP in openvla-v01-7b).
        fused_vision_config: The second tower, which sees the same image; `None` for a single tower.
        text_config: The causal language model.
        vision_feature_layer: Block of the towers whose output is read; -2 is the second-to-last. Later blocks are not
            built.
        projector_hidden_act: Activation between the projector's layers.
        image_token_index: Id of the placeholder for each image patch in `input_ids`. Its row of the embedding is
            padding, so the tokenizer never produces it.
        prompt_suffix_token_id: Id that must precede the action tokens (Llama's empty piece); `None` for none.
        n_action_bins: Number of action tokens.
        pad_to_multiple_of: Number of padding rows at the end of the embedding. The action ids are the last
            `n_action_bins` ids before them.
        norm_stats: `{key: {"action": {"q01", "q99", "mask", ...}, ...}}`, the statistics of `predict_action`.
        num_images: Number of cameras. Each prediction uses one image from each camera.
        action_decoding: "autoregressive" (OpenVLA: one token after another) or "parallel" (OpenVLA-OFT: a chunk of
            actions in one bidirectional pass).
        action_head: Output of parallel decoding: "none" for action tokens, or "l1" or "diffusion" for a network that
            predicts numbers.
        action_horizon: Number of actions in a chunk. Values above 1 need parallel decoding.
        action_dim: Number of dimensions of an action. Parallel decoding requires this field.
        proprio_dim: Number of dimensions of the robot's state if the model sees it, else `None`.
        action_normalization: Statistics that correspond to -1 and 1: "q99" (`q01` and `q99`) or "bounds" (`min` and
            `max`).
        use_film: Whether the instruction modulates the vision towers (OpenVLA-OFT+).
        diffusion_steps: Number of steps in the noise schedule of a diffusion head.
        action_stop_token: Whether the end-of-sequence token follows the action slots of parallel decoding. RLinf's
            checkpoints have none.
        reasoning: Whether the model writes its reasoning before the action (Embodied-CoT). The prompt then has no
            suffix. Saved only if true.

    The fields from `num_images` to `action_stop_token` are saved only if one of them differs from its default.

    A published config (with `vision_backbone_id`) is converted to these fields. `vision_config` and
    `fused_vision_config` alongside it override single fields of the towers that the id names.
    """

    model_type = "openvla"
    attribute_map = {"image_token_id": "image_token_index"}  # noqa: RUF012
    # Names of the fields in `OFT_FIELDS` that the caller of `from_pretrained` gave. Not saved.
    given_fields = ()
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(AutoConfig, model_type="dinov2_with_registers"),
        "fused_vision_config": SubConfigSpec(AutoConfig, model_type="siglip_vision_model", optional=True),
        "text_config": SubConfigSpec(AutoConfig, model_type="llama", init_kwargs=PUBLISHED_TEXT_DEFAULTS),
    }

    # Given as dicts or configs, and always configs after `__post_init__`.
    vision_config: Any = None
    fused_vision_config: Any = None
    text_config: Any = None
    vision_feature_layer: int = -2
    projector_hidden_act: str = "gelu"
    image_token_index: int = 32001
    prompt_suffix_token_id: int | None = 29871
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    pad_token_id: int | None = 32000
    norm_stats: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    num_images: int = 1
    action_decoding: str = "autoregressive"
    action_head: str = "none"
    action_horizon: int = 1
    action_dim: int | None = None
    proprio_dim: int | None = None
    action_normalization: str = "q99"
    use_film: bool = False
    diffusion_steps: int = 50
    action_stop_token: bool = True
    reasoning: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        backbone_id = kwargs.get("vision_backbone_id")
        if backbone_id is not None:
            self._read_published(backbone_id)
        for name in PUBLISHED_ONLY_FIELDS:
            kwargs.pop(name, None)
        if self.reasoning:
            self.prompt_suffix_token_id = None
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        if self.vision_feature_layer >= 0:
            raise ValueError(
                f"`vision_feature_layer` counts from the last block and must be negative, got "
                f"{self.vision_feature_layer}."
            )
        for config in self.vision_configs:
            if self.vision_layers_built(config) < 1:
                raise ValueError(
                    f"`vision_feature_layer={self.vision_feature_layer}` reads below the first block of a tower of "
                    f"{config.num_hidden_layers} layers: give at least -{config.num_hidden_layers}."
                )
        self._check_ids()
        self.check_action_fields()
        check_name(self.projector_hidden_act, ACT2CLS, "`projector_hidden_act`")
        patches = {(config.image_size // config.patch_size) ** 2 for config in self.vision_configs}
        if len(patches) != 1:
            raise ValueError(
                f"Both vision towers must have the same number of patches, got {sorted(patches)}: their features are "
                "concatenated patch by patch."
            )

    def _check_ids(self) -> None:
        """Check the fields that place the action ids and the image placeholder in the vocabulary."""
        vocab_size = self.text_config.vocab_size
        lowest = {"n_action_bins": 2, "pad_to_multiple_of": 0, "image_token_index": 0}
        if self.prompt_suffix_token_id is not None:
            lowest["prompt_suffix_token_id"] = 0
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < vocab_size:
                raise ValueError(
                    f"`{name}` must be an integer from {low} to {vocab_size - 1} (the vocabulary has {vocab_size} "
                    f"ids), got {value!r}."
                )
        first_id = ActionTokenizer(self.action_vocab_end, self.n_action_bins).first_id
        if first_id < 0:
            raise ValueError(
                f"`n_action_bins={self.n_action_bins}` does not fit a vocabulary of {vocab_size} ids, of which "
                f"`pad_to_multiple_of={self.pad_to_multiple_of}` are padding."
            )
        if first_id <= self.image_token_index < self.action_vocab_end:
            raise ValueError(
                f"`image_token_index={self.image_token_index}` is an action id (these are {first_id} to "
                f"{self.action_vocab_end - 1}): choose an id outside this range."
            )

    def check_action_fields(self) -> None:
        """Check the fields that OpenVLA-OFT adds; raise `ValueError` if one is wrong or contradicts another."""
        for name, choices in ACTION_CHOICES.items():
            check_name(getattr(self, name), choices, f"`{name}`")
        counts = ["num_images", "action_horizon", "diffusion_steps"]
        counts += [name for name in ("action_dim", "proprio_dim") if getattr(self, name) is not None]
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name in ("use_film", "action_stop_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.reasoning and (self.is_parallel or self.text_config.eos_token_id is None):
            raise ValueError(
                "`reasoning=True` needs `action_decoding='autoregressive'`, and a language model whose `eos_token_id` "
                "ends the text."
            )
        if self.is_parallel:
            self._check_parallel()
            return
        if self.action_head != "none":
            raise ValueError(f"`action_head={self.action_head!r}` needs `action_decoding='parallel'`.")
        if self.action_horizon > 1:
            raise ValueError(f"`action_horizon={self.action_horizon}` needs `action_decoding='parallel'`.")
        if self.use_film:
            raise ValueError("`use_film=True` needs `action_decoding='parallel'`.")

    def _check_parallel(self) -> None:
        """Check the fields that parallel decoding needs."""
        if self.action_dim is None:
            raise ValueError("Parallel decoding needs the number of action dimensions: give `action_dim`.")
        if self.action_stop_token and self.text_config.eos_token_id is None:
            raise ValueError(
                "The language model has no end-of-sequence token to put after the actions: give `eos_token_id` in "
                "`text_config`, or `action_stop_token=False`."
            )
        if self.text_config.model_type not in BIDIRECTIONAL_LANGUAGE_MODELS:
            raise ValueError(
                f"Parallel decoding is not tested with the language model {self.text_config.model_type!r}, whose "
                f"attention may stay causal: use one of {', '.join(map(repr, BIDIRECTIONAL_LANGUAGE_MODELS))}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary, without the fields of OpenVLA-OFT if all of them have their defaults."""
        fields = super().to_dict()
        fields.pop("given_fields", None)
        added = {name: type(self).__dataclass_fields__[name].default for name in OFT_FIELDS}
        # Code that was pushed with older checkpoints does not know these fields.
        if all(fields.get(name, default) == default for name, default in added.items()):
            for name in added:
                fields.pop(name, None)
        if not fields.get("reasoning"):
            fields.pop("reasoning", None)
        return fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config like `PreTrainedConfig.from_dict`; a sub-config given as a dict overrides single fields."""
        config_dict = dict(config_dict)
        for name in cls.sub_configs:
            if isinstance(kwargs.get(name), dict):
                merged = (config_dict.get(name) or {}) | kwargs.pop(name)
                # These fields name the stages of the stored number of layers, which the override may change.
                config_dict[name] = {k: v for k, v in merged.items() if k not in ("out_features", "out_indices")}
        if "reasoning" in kwargs:  # before other fields are checked, since it changes the prompt
            config_dict["reasoning"] = kwargs.pop("reasoning")
        built = super().from_dict(config_dict, **kwargs)
        if given := tuple(name for name in OFT_FIELDS if name in kwargs):
            config = built[0] if kwargs.get("return_unused_kwargs") else built
            config.given_fields = given
        return built

    def _read_published(self, backbone_id: str) -> None:
        """Fill in the sub-configs that a published config gives by the names of its backbones."""
        if backbone_id not in PUBLISHED_VISION_BACKBONES:
            raise ValueError(
                f"Unknown `vision_backbone_id` {backbone_id!r}; this package builds "
                f"{', '.join(PUBLISHED_VISION_BACKBONES)}. For another tower give `vision_config` (and "
                "`fused_vision_config`) instead."
            )
        vision, fused = PUBLISHED_VISION_BACKBONES[backbone_id]
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = vision | (self.vision_config or {})
        if fused is not None and not isinstance(self.fused_vision_config, PreTrainedConfig):
            self.fused_vision_config = fused | (self.fused_vision_config or {})
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = PUBLISHED_TEXT_DEFAULTS | (self.text_config or {})

    @property
    def vision_configs(self) -> list[PreTrainedConfig]:
        """Configs of the towers, in the order in which their channels and features are concatenated."""
        return [config for config in (self.vision_config, self.fused_vision_config) if config is not None]

    def vision_layers_built(self, config: PreTrainedConfig) -> int:
        """Count the blocks of a tower up to the one whose output is read."""
        return config.num_hidden_layers + self.vision_feature_layer + 1

    @property
    def num_image_tokens(self) -> int:
        """Number of patches of one image; each has a placeholder in `input_ids`."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Number of embeddings between BOS and the prompt: patches of all images, the state and the diffusion time."""
        is_diffusion = self.action_head == "diffusion"
        return self.num_images * self.num_image_tokens + (self.proprio_dim is not None) + is_diffusion

    @property
    def is_parallel(self) -> bool:
        """Whether all actions of a chunk are decoded in one pass."""
        return self.action_decoding == "parallel"

    @property
    def action_vocab_end(self) -> int:
        """One past the highest action id (32000 for Llama-2)."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


OpenVLAConfig.register_for_auto_class()

__all__ = ["OpenVLAConfig"]
