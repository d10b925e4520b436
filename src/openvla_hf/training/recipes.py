"""Named recipes: which weights are trained, how, and how much memory this takes.

A recipe is a small dataclass whose fields can all be overridden: `recipe("lora", lora_rank=64)`.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.table import Table
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpoints.quantize import expected_weight_bytes, quantization
from ..modeling.action_networks import add_action_networks, list_networks
from ..modeling.configuration_openvla import ACTION_CHOICES, OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from .settings import check_metric, check_trackers, check_value


# Linear layers that actions depend on, by the last part of their names: towers, projector and language model.
LINEAR_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("fc1", "fc2", "fc3"),
    *("gate_proj", "up_proj", "down_proj"),
)
# The published adapters were made with "all-linear", which also adapted the patch embeddings and the LM head.
PATCH_EMBEDDINGS = ("projection", "patch_embedding")
LM_HEAD = ("lm_head",)

VISION = ("model.vision_backbone",)
PROJECTOR = ("model.projector",)
LANGUAGE_MODEL = ("model.language_model", "lm_head")
LAST_LAYER = ("model.language_model.embed_tokens", "model.language_model.layers[-1]", "lm_head")

TRAINING_DTYPES = ("bfloat16", "float16", "float32")
ADAMW_STATE_BYTES = 8
# Numbers that autograd keeps for each input and output feature of a linear layer. The part above 1 estimates the
# operations between the layers (norms, rotary positions, gates); a test compares it with what autograd really keeps.
KEPT_PER_FEATURE = 1.3
GIB = 2**30


@dataclass(frozen=True)
class Recipe:
    """Settings that define how a policy is fine-tuned.

    Args:
        lora_rank: Rank of the adapters; 0 trains the weights themselves.
        lora_alpha: Scale of the adapters, divided by their rank.
        lora_dropout: Dropout rate of the adapters' input.
        lora_targets: Layers that get an adapter, by the end of their names.
        trained: Modules whose weights are trained if there are no adapters; `layers[-1]` is the last of a list.
        quantize: Whether to keep the base in 4 bits (NF4) and the adapters in float32.
        dtype: Type of the frozen weights: bfloat16, float16 or float32. Trained weights are float32. With bfloat16,
            the arithmetic is bfloat16 too.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Schedule of the learning rate, by its name in transformers.
        warmup_steps: Steps in which the learning rate rises from 0.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Norm to which gradients are clipped; 0 for no clipping.
        batch_size: Number of samples in a batch of one process.
        gradient_accumulation_steps: Number of batches in one optimizer step.
        gradient_checkpointing: Whether to compute the activations of each block again in the backward pass.
        augment: Whether to crop images and change their colours at random, and crop the centre for prediction.
        seed: Seed of all random numbers of a run.
        action_head: Predict a chunk of actions in one pass (OpenVLA-OFT): "l1" or "diffusion" for numbers, "none" for
            action tokens. `None` keeps the decoding of the base model. The head and the projectors are trained in
            full.
        action_horizon: Number of actions in a chunk; the frames need `chunk=` of the same number.
        use_state: Whether a policy with a new `action_head` sees the robot's state. The frames need `state=True`.
        use_film: Whether the instruction modulates the vision towers. Needs `action_head`.
        action_normalization: Which statistics map actions and states to [-1, 1], with a new `action_head`: "q99" for
            the quantiles 0.01 and 0.99, "bounds" for the smallest and the largest value. `None` keeps the choice of
            the base model, which is "q99" for a plain one.
        decay_step: Step after which the learning rate drops to a tenth; 0 for never.

    Raises:
        ValueError: A field has a value of the wrong type or out of its range.
    """

    lora_rank: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LINEAR_LAYERS
    trained: tuple[str, ...] = ()
    quantize: bool = False
    dtype: str = "bfloat16"
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    augment: bool = False
    seed: int = 7
    action_head: str | None = None
    action_horizon: int = 1
    use_state: bool = False
    use_film: bool = False
    action_normalization: str | None = None
    decay_step: int = 0

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(Recipe).items():
            check_value(name, getattr(self, name), annotation)
        check_name(self.dtype, TRAINING_DTYPES, "dtype")
        for name in ("action_head", "action_normalization"):
            if (value := getattr(self, name)) is not None:
                check_name(value, ACTION_CHOICES[name], name)
        needing = (self.action_horizon > 1, self.use_state, self.use_film, self.action_normalization is not None)
        if self.action_head is None and any(needing):
            raise ValueError(
                "action_horizon, use_state, use_film and action_normalization need an action_head: start from the "
                "recipe 'oft', 'oft-discrete' or 'oft-diffusion'."
            )
        if self.decay_step and self.lr_scheduler_type != "constant":
            raise ValueError(
                f"decay_step={self.decay_step} needs the schedule 'constant', got {self.lr_scheduler_type!r}. Set "
                "decay_step=0 to use another schedule."
            )

    def action_fields(self, action_dim: int, num_images: int = 1, proprio_dim: int | None = None) -> dict[str, Any]:
        """Return the fields of the config that the recipe sets, or an empty dict if it keeps those of the base.

        Args:
            action_dim: Number of dimensions of the data's actions.
            num_images: Number of cameras in the data.
            proprio_dim: Number of dimensions of the data's state, or `None`.
        """
        if self.action_head is None:
            return {}
        return {
            "action_decoding": "parallel",
            "action_head": self.action_head,
            "action_horizon": self.action_horizon,
            "action_dim": action_dim,
            "num_images": num_images,
            "proprio_dim": proprio_dim,
            "use_film": self.use_film,
            **({"action_normalization": self.action_normalization} if self.action_normalization else {}),
        }

    def load_options(self) -> dict[str, Any]:
        """Return the options of `openvla_hf.data.load` that the recipe needs."""
        options = {"chunk": (self.action_horizon, 1), "state": (self.use_state, False)}
        return {name: value for name, (value, default) in options.items() if value != default}

    @property
    def uses_adapters(self) -> bool:
        """Whether an adapter is trained while the base stays frozen."""
        return self.lora_rank > 0

    def training_arguments(self, output_dir: str, **overrides: Any) -> TrainingArguments:
        """Build the `TrainingArguments` of the recipe.

        Args:
            output_dir: Folder of the checkpoints.
            overrides: Arguments of `TrainingArguments`, which override the recipe.

        Raises:
            ValueError: An override has an unknown name or an impossible value.
            ImportError: A tracker of `report_to` is not installed.
        """
        annotations = get_type_hints(TrainingArguments)
        names = [one.name for one in dataclasses.fields(TrainingArguments) if one.init and one.name != "output_dir"]
        of_recipe = get_type_hints(Recipe).keys() - set(names)
        for name, value in overrides.items():
            check_name(name, [*names, *of_recipe], "setting")
            if name in of_recipe:
                raise ValueError(f"{name} is a field of the recipe. Pass it to `recipe`.")
            check_value(name, value, annotations[name])
        # transformers has renamed the argument and warns about the old name.
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        fields = {
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            checkpointing: self.gradient_checkpointing or None,
            f"{checkpointing}_kwargs": {"use_reentrant": False} if self.gradient_checkpointing else None,
            "bf16": self.dtype == "bfloat16",
            "use_cpu": not torch.accelerator.is_available(),
            "seed": self.seed,
            "remove_unused_columns": False,
            # Each process reads its own batches: one process could not split a batch whose prompts differ in length.
            "accelerator_config": {"dispatch_batches": False},
            "report_to": "none",
            "logging_nan_inf_filter": False,  # the first loss that is not finite ends the run
        }
        fields = {name: value for name, value in fields.items() if value is not None}
        if (metric := overrides.get("metric_for_best_model")) is not None:
            check_metric(metric)
            fields["greater_is_better"] = "accuracy" in metric
        try:
            args = TrainingArguments(output_dir=output_dir, **(fields | overrides))
        except (ImportError, OSError, TypeError, ValueError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
            reason = " ".join(str(error).split())
            raise ValueError(f"TrainingArguments does not accept the settings {given}: {reason}") from error
        check_trackers(args.report_to)
        return args

    def model_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` for the base."""
        kwargs: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if self.quantize:
            kwargs["quantization_config"] = quantization("4bit")
        return kwargs

    def prepare(self, model: OpenVLAForActionPrediction) -> OpenVLAForActionPrediction | PeftModel:
        """Add the adapters to a model, or mark the weights to train.

        Raises:
            ValueError: Nothing would be trained, or the model lacks a module of `trained`.
        """
        if self.uses_adapters:
            return self._add_adapters(model)
        if not self.trained:
            raise ValueError("This recipe trains nothing. Set `lora_rank`, or name modules in `trained`.")
        model.requires_grad_(False)
        added = list_networks(model)
        names = [name for name, _ in model.named_modules() if name.rpartition(".")[-1] in added]
        for name in (*self.trained, *names):
            # At these learning rates, steps are too small for bfloat16.
            find_module(model, name).requires_grad_(True).float()
        return model

    def _add_adapters(self, model: OpenVLAForActionPrediction) -> PeftModel:
        if self.quantize and model.device.type != "meta":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=list(self.lora_targets),
            init_lora_weights="gaussian",
            # These networks start from random weights, for which an adapter of low rank is not enough.
            modules_to_save=list_networks(model) or None,
        )
        if self.gradient_checkpointing:
            model.enable_input_require_grads()
        return get_peft_model(model, config)


RECIPES: dict[str, Recipe] = {
    "lora": Recipe(lora_rank=32, learning_rate=5e-4, weight_decay=0.01, max_grad_norm=0.0, augment=True),
    "full": Recipe(trained=("model", "lm_head")),
    "frozen-vision": Recipe(trained=PROJECTOR + LANGUAGE_MODEL),
    "last-layer": Recipe(trained=LAST_LAYER),
    "sandwich": Recipe(trained=VISION + PROJECTOR + LAST_LAYER),
}
RECIPES["lora-paper"] = dataclasses.replace(
    RECIPES["lora"], lora_targets=(*LINEAR_LAYERS, *PATCH_EMBEDDINGS, *LM_HEAD)
)
RECIPES["oft"] = dataclasses.replace(
    RECIPES["lora"],
    lora_targets=(*LINEAR_LAYERS, *PATCH_EMBEDDINGS),
    action_head="l1",
    action_horizon=8,
    use_state=True,
    batch_size=8,
    decay_step=100_000,
)
RECIPES["oft-diffusion"] = dataclasses.replace(RECIPES["oft"], action_head="diffusion")
RECIPES["oft-discrete"] = dataclasses.replace(
    RECIPES["oft"], lora_targets=RECIPES["lora-paper"].lora_targets, action_head="none"
)
RECIPES["qlora"] = dataclasses.replace(RECIPES["lora"], quantize=True, gradient_checkpointing=True)
# Pretraining as in the paper: 32 samples on each of 64 GPUs. `configs/openx-*.toml` divide them over fewer GPUs.
RECIPES["openx"] = dataclasses.replace(RECIPES["full"], batch_size=32, gradient_checkpointing=True)
# For language models of about a billion parameters on one GPU. A projector that starts at random needs the warm-up.
RECIPES["openx-small"] = dataclasses.replace(
    RECIPES["openx"],
    gradient_accumulation_steps=8,
    learning_rate=5e-5,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=500,
)


def recipe(name: str, **overrides: Any) -> Recipe:
    """Return a recipe by name. Without a GPU, its `dtype` is float32 unless it is given.

    Args:
        name: Name of one of `RECIPES`.
        overrides: Fields to change.

    Raises:
        ValueError: The recipe or a field is unknown, or a value is invalid.
    """
    check_name(name, RECIPES, "recipe")
    for override in overrides:
        check_name(override, get_type_hints(Recipe), "field of a recipe")
    if not torch.accelerator.is_available():
        overrides = {"dtype": "float32"} | overrides
    return dataclasses.replace(RECIPES[name], **overrides)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module with a dotted name, in which `layers[-1]` is the last of a list.

    Raises:
        ValueError: The model has no such module.
    """
    is_last = name.endswith("[-1]")
    try:
        module = model.get_submodule(name.removesuffix("[-1]"))
    except AttributeError as error:
        raise ValueError(f"This model has no module {name!r} to train.") from error
    return list(module.children())[-1] if is_last else module


@dataclass(frozen=True)
class Cost:
    """Estimate of the memory that a recipe needs on each device.

    The allocator's overhead and evaluation are not included.

    Args:
        trainable: Number of trained parameters.
        parameters: Number of all parameters.
        weights: GiB of the weights.
        gradients: GiB of the gradients.
        optimizer: GiB of the optimizer's state.
        activations: GiB of the activations that the backward pass needs.
    """

    trainable: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.weights + self.gradients + self.optimizer + self.activations)


def estimate_cost(
    config: OpenVLAConfig,
    recipe: Recipe,
    prompt_tokens: int = 40,
    num_images: int = 1,
    proprio_dim: int | None = None,
) -> Cost:
    """Count the parameters of a recipe and estimate its memory from the configuration, without loading any weights.

    Args:
        config: Configuration of the base model.
        recipe: Recipe to estimate.
        prompt_tokens: Number of text tokens of a sample, including one action. Image tokens and the other actions of a
            chunk are added.
        num_images: Number of cameras, for a recipe with an `action_head`.
        proprio_dim: Dimensions of the state, for a recipe that uses it.
    """
    model: Any = meta_model(config, recipe, num_images, proprio_dim)
    config = model.config
    rows = recipe.batch_size * config.num_image_tokens * config.num_images
    later_actions = (config.action_horizon - 1) * (config.action_dim or 0)
    text_rows = rows + recipe.batch_size * (prompt_tokens + later_actions)
    kept = {
        name: _kept_for_backward(model.get_submodule(name), text_rows if name in LANGUAGE_MODEL else rows, recipe)
        for name in VISION + PROJECTOR + LANGUAGE_MODEL[:1]
    }
    model = recipe.prepare(model)
    parameters = dict(model.named_parameters())
    learning = {name: one for name, one in parameters.items() if one.requires_grad}
    # The backward pass ends at the first part that is trained.
    first = next((i for i, part in enumerate(kept) if any(part in name for name in learning)), 0)
    trainable = sum(one.numel() for one in learning.values())
    gradients = sum(one.numel() * one.element_size() for one in learning.values())
    if recipe.quantize:
        weights = expected_weight_bytes(config, "4bit") + gradients
    else:
        weights = sum(one.numel() * one.element_size() for one in parameters.values())
    return Cost(
        trainable=trainable,
        parameters=sum(one.numel() for one in parameters.values()),
        weights=weights / GIB,
        gradients=gradients / GIB,
        optimizer=ADAMW_STATE_BYTES * trainable / GIB,
        activations=sum(list(kept.values())[first:]) / GIB,
    )


def meta_model(
    config: OpenVLAConfig, recipe: Recipe, num_images: int = 1, proprio_dim: int | None = None
) -> OpenVLAForActionPrediction:
    """Build the model of a recipe without memory for its weights. See `estimate_cost`."""
    with torch.device("meta"):
        model: Any = OpenVLAForActionPrediction(copy.deepcopy(config)).to(getattr(torch, recipe.dtype))
    if not config.is_parallel:  # with the most common size of an action
        fields = recipe.action_fields(config.action_dim or 7, num_images, proprio_dim if recipe.use_state else None)
        add_action_networks(model, fields)
    return model


def cost_table(title: str, cost: Cost) -> Table:
    """Make a table of the trained parameters and the memory."""
    table = Table(title=title, show_header=False)
    table.add_row("trainable", f"{cost.trainable:,} of {cost.parameters:,} ({cost.trainable / cost.parameters:.2%})")
    for name in ("weights", "gradients", "optimizer", "activations", "total"):
        table.add_row(name, describe_memory(getattr(cost, name)), style="bold" if name == "total" else None)
    return table


def describe_memory(gib: float) -> str:
    """Describe an estimate of memory, in MiB if it is below 1 GiB."""
    return f"about {gib:.1f} GiB" if gib >= 1 else f"about {gib * 1024:.1f} MiB"


def _kept_for_backward(part: nn.Module, rows: int, recipe: Recipe) -> float:
    """Estimate the bytes of a part's forward pass that its backward pass needs.

    These are mostly the inputs and outputs of its linear layers. With gradient checkpointing, they are the inputs of
    its blocks and the activations of one block.
    """
    size = getattr(torch, recipe.dtype).itemsize

    def between_layers(module: nn.Module) -> float:
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        return size * KEPT_PER_FEATURE * rows * sum(layer.in_features + layer.out_features for layer in linear)

    blocks = [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not recipe.gradient_checkpointing or not blocks:
        return between_layers(part)
    width = next(layer.in_features for layer in blocks[0].modules() if isinstance(layer, nn.Linear))
    return float(size * rows * width * len(blocks)) + max(between_layers(block) for block in blocks)


__all__ = [
    "RECIPES",
    "Cost",
    "Recipe",
    "cost_table",
    "describe_memory",
    "estimate_cost",
    "find_module",
    "meta_model",
    "recipe",
]
