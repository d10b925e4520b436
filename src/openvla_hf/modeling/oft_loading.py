"""Published OpenVLA-OFT checkpoints: components in separate files, and config fields that no file states.

An OFT checkpoint is an OpenVLA checkpoint with further components next to it, each saved by `torch.save`. Its
`config.json` is that of plain OpenVLA, because the original takes everything else from its command line. Here the
other fields of the config come from the files and the shapes in them, the robot's platform and the arguments of
`from_pretrained`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from logging import LogRecord
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from .checkpoint_files import OFT_FILES, CheckpointFiles, hub_error
from .configuration_openvla import OFT_FIELDS, OpenVLAConfig
from .film import film_backbone_weights
from .known_names import check_name
from .torch_files import read_torch_file


logger = logging.get_logger(__name__)

# Fields of the config that the original keeps in constants, which a word in its command line selects.
PLATFORMS: dict[str, dict[str, Any]] = {
    "libero": {
        "num_images": 2,
        "action_horizon": 8,
        "action_dim": 7,
        "proprio_dim": 8,
        "action_normalization": "q99",
    },
    "aloha": {
        "num_images": 3,
        "action_horizon": 25,
        "action_dim": 14,
        "proprio_dim": 14,
        "action_normalization": "bounds",
    },
    "bridge": {
        "num_images": 1,
        "action_horizon": 5,
        "action_dim": 7,
        "proprio_dim": 7,
        "action_normalization": "q99",
    },
}
# Fields that must be known for a policy that decodes in parallel.
NEEDED_FIELDS = ("num_images", "action_horizon", "action_dim", "action_normalization")
# Fields of a checkpoint without component files.
WITHOUT_COMPONENTS: dict[str, Any] = {
    "action_decoding": "parallel",
    "action_head": "none",
    "num_images": 1,
    "proprio_dim": None,
    "use_film": False,
}

SUFFIX = "_checkpoint.pt"
# Field of the config -> component that it belongs to.
COMPONENTS_OF_FIELDS = {
    "action_head": "action_head",
    "action_dim": "action_head",
    "proprio_dim": "proprio_projector",
    "use_film": "vision_backbone",
}

# Prefix of weight names after training with DistributedDataParallel.
PARALLEL_PREFIX = "module."
# Kind of action head -> prefix of its modules in its file.
HEAD_PREFIXES = {"l1": "model.", "diffusion": "noise_predictor.mlp_resnet."}
PROJECTOR_MODULES = {"fc1": "fc1", "fc2": "fc2"}
# Component -> published module -> ours.
MODULES: dict[str, dict[str, str]] = {
    "action_head": {
        "layer_norm1": "layer_norm1",
        "fc1": "fc1",
        "mlp_resnet_blocks.0.ffn.0": "blocks.0.norm",
        "mlp_resnet_blocks.0.ffn.1": "blocks.0.linear",
        "mlp_resnet_blocks.1.ffn.0": "blocks.1.norm",
        "mlp_resnet_blocks.1.ffn.1": "blocks.1.linear",
        "layer_norm2": "layer_norm2",
        "fc2": "fc2",
    },
    "proprio_projector": PROJECTOR_MODULES,
    "noisy_action_projector": PROJECTOR_MODULES,
}
# Component -> path of its module in our model.
PATHS = {
    "action_head": "action_head.",
    "proprio_projector": "model.proprio_projector.",
    "noisy_action_projector": "model.noisy_action_projector.",
    "vision_backbone": "model.vision_backbone.",
}


@dataclass(frozen=True)
class Components:
    """Components of a published OFT checkpoint.

    Attributes:
        files: Component -> name of its file.
        weights: Weights by our names.
        fields: Fields of the config that the files and the shapes in them determine.
        backbone: Weights of a vision backbone with FiLM, as published. They replace those of the main file.
    """

    files: dict[str, str] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, torch.Tensor] = field(default_factory=dict)


def component_files(files: CheckpointFiles) -> dict[str, str]:
    """Find the file of each component of a published OFT checkpoint: component -> name.

    Raises:
        ValueError: A component has two files, or a file with another ending.
        OSError: A file is listed, but is not in the cache and can't be downloaded.
    """
    found = {}
    for pattern in OFT_FILES:
        component = pattern.removesuffix("--*")
        names = files.match([pattern])
        if not names:
            continue
        if len(names) > 1:
            raise ValueError(
                f"{files.source} has {len(names)} files of the {component} ({', '.join(names)}): keep only the "
                "file of the step that you want."
            )
        if names[0] not in files.names:
            raise hub_error(str(files.source), names[0], files.failure)
        if not names[0].endswith(SUFFIX):
            raise ValueError(
                f"Cannot read {names[0]} of {files.source} as the {component}: rename the file to "
                f"{component}--STEP{SUFFIX}."
            )
        found[component] = names[0]
    return found


def read_components(files: CheckpointFiles) -> Components:
    """Read the components of a published OFT checkpoint; without any, the result is empty.

    Raises:
        ValueError: A component contains more than tensors or has other weights than the original's, or the components
            don't belong together.
        OSError: A file can't be read.
    """
    found = component_files(files)
    weights: dict[str, torch.Tensor] = {}
    backbone: dict[str, torch.Tensor] = {}
    known: dict[str, Any] = {"action_decoding": "parallel", "action_head": "none", "use_film": False} if found else {}
    for component, name in found.items():
        path = files.find(name)
        assert path is not None  # it was listed
        state = _read_state_dict(path)
        if component == "vision_backbone":
            known["use_film"] = True
            backbone = state
            continue
        renamed = _rename(component, state, f"{name} of {files.source}")
        known |= renamed.fields
        weights |= renamed.weights
    if found:
        _check_head(files.source, found, known["action_head"])
    return Components(found, weights, known, backbone)


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Read a state dict, and remove the prefix of DistributedDataParallel."""
    state = read_torch_file(path)
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is not a state dict: save only the state dict of the component.")
    return {key.removeprefix(PARALLEL_PREFIX): tensor for key, tensor in state.items()}


def _rename(component: str, state: dict[str, torch.Tensor], where: str) -> Components:
    """Translate the weights of a component to our names, and read the fields that their shapes determine."""
    shown: dict[str, Any] = {}
    prefix = ""
    if component == "action_head":
        kinds = [kind for kind, start in HEAD_PREFIXES.items() if all(key.startswith(start) for key in state)]
        if not kinds:
            raise ValueError(
                f"{where} has the unknown weight {min(state)!r}: it is not an action head of OpenVLA-OFT."
            )
        shown["action_head"] = kinds[0]
        prefix = HEAD_PREFIXES[kinds[0]]
    names = {
        f"{prefix}{published}.{kind}": f"{PATHS[component]}{ours}.{kind}"
        for published, ours in MODULES[component].items()
        for kind in ("weight", "bias")
    }
    for problem, keys in (
        ("lacks", names.keys() - state.keys()),
        ("has the unknown weight", state.keys() - names.keys()),
    ):
        if keys:
            raise ValueError(f"{where} {problem} {min(keys)!r}: it is not a {component} of OpenVLA-OFT.")
    if component == "action_head":
        shown["action_dim"] = len(state[f"{prefix}fc2.weight"])
    elif component == "proprio_projector":
        shown["proprio_dim"] = state["fc1.weight"].shape[-1]
    return Components(weights={names[key]: tensor for key, tensor in state.items()}, fields=shown)


def _check_head(source: Any, found: dict[str, str], head: str) -> None:
    """Raise `ValueError` if a diffusion head has no noisy action projector, or if any other policy has one."""
    has_projector = "noisy_action_projector" in found
    if head == "diffusion" and not has_projector:
        raise ValueError(
            f"{source} has a diffusion head ({found['action_head']}) without a file "
            f"noisy_action_projector--*{SUFFIX}: copy the file next to the config."
        )
    if has_projector and head != "diffusion":
        of_head = f"{found['action_head']} is not a diffusion head" if "action_head" in found else "has no action head"
        raise ValueError(
            f"{source} has {found['noisy_action_projector']}, but {of_head}: keep the files of one training run."
        )


def resolve_fields(components: Components, platform: str | None, given: dict[str, Any], source: Any) -> dict[str, Any]:
    """Resolve the fields of the config that a published OFT checkpoint does not state.

    Args:
        components: Components of the checkpoint. Without any, the checkpoint has no head, no state and one image.
        platform: Name in `PLATFORMS`, or `None` to recognise it from the dimensions of the action and the state.
        given: Fields that the caller of `from_pretrained` gave; they take precedence over the platform's.
        source: Folder or Hub id, for the messages.

    Returns:
        All fields, those in `given` included.

    Raises:
        ValueError: The platform is unknown, a field contradicts the files, or a field stays unknown.
    """
    if platform is not None:
        check_name(platform, PLATFORMS, "`platform`")
    known = components.fields if components.files else dict(WITHOUT_COMPONENTS)
    _refuse_contradictions(components, known, given, source)
    if components.files and "proprio_dim" not in known | given:
        raise ValueError(
            f"{source} has no file proprio_projector--*{SUFFIX}: copy it next to the config, or pass "
            "`proprio_dim=None` if the policy was trained without the robot's state."
        )
    stated = known | given
    unknown = [name for name in NEEDED_FIELDS if name not in stated]
    if platform is None and unknown:
        platform = _recognized_platform(stated, source, unknown[0])
        taken = ", ".join(f"{name}={PLATFORMS[platform][name]!r}" for name in unknown)
        logger.warning(
            f"{source} does not state all fields of its config. Using {taken} of the platform {platform!r}, which has "
            f"the same dimensions. Pass `platform={platform!r}` if this is right, or else the correct fields, such as "
            f"`{unknown[0]}=`."
        )
    preset = PLATFORMS[platform] if platform is not None else {}
    for name in ("action_dim", "proprio_dim"):
        if name not in given and known.get(name) is not None and preset.get(name, known[name]) != known[name]:
            raise ValueError(
                f"{components.files[COMPONENTS_OF_FIELDS[name]]} of {source} is for {name}={known[name]}, but the "
                f"platform {platform!r} has {preset[name]}: pass another `platform=`, one of {_options(PLATFORMS)}."
            )
    return preset | stated


def _refuse_contradictions(components: Components, known: dict[str, Any], given: dict[str, Any], source: Any) -> None:
    for name, component in COMPONENTS_OF_FIELDS.items():
        if name not in given or given[name] == known.get(name, given[name]):
            continue
        if component in components.files:
            raise ValueError(
                f"`{name}={given[name]!r}` contradicts {components.files[component]} of {source}, which is for "
                f"{name}={known[name]!r}: leave out `{name}`."
            )
        raise ValueError(
            f"`{name}={given[name]!r}` needs a file {component}--*{SUFFIX}, which {source} lacks: copy the file "
            f"next to the config, or leave out `{name}`."
        )
    if given.get("action_decoding", "parallel") != "parallel":
        first = next(iter(components.files.values()))
        raise ValueError(
            f"`action_decoding={given['action_decoding']!r}` contradicts {first} of {source}, a component of a policy "
            "that decodes in parallel: leave out `action_decoding`."
        )


def fitting_platforms(stated: dict[str, Any]) -> list[str]:
    """Return the platforms that match the dimensions of the action and the state, as far as these are known."""
    dims = [name for name in ("action_dim", "proprio_dim") if stated.get(name) is not None]
    return [name for name, preset in PLATFORMS.items() if dims and all(preset[dim] == stated[dim] for dim in dims)]


def _recognized_platform(stated: dict[str, Any], source: Any, unknown: str) -> str:
    """Return the only platform that fits."""
    fitting = fitting_platforms(stated)
    if len(fitting) == 1:
        return fitting[0]
    dims = [f"{name}={stated[name]}" for name in ("action_dim", "proprio_dim") if stated.get(name) is not None]
    who = "several platforms have" if fitting else "no known platform has"
    reason = f", and {who} {' and '.join(dims)}" if dims else ""
    raise ValueError(
        f"{source} does not state `{unknown}`{reason}: pass `platform=`, one of {_options(fitting or PLATFORMS)}, or "
        f"`{unknown}=`."
    )


def _options(names: Any) -> str:
    return ", ".join(map(repr, names))


def complete_config(
    files: CheckpointFiles, components: Components, platform: str | None, kwargs: dict[str, Any]
) -> None:
    """Complete the config of a published OFT checkpoint, and put it into `kwargs["config"]`.

    Fields of the config in `kwargs` are moved into the config. For any other checkpoint, `kwargs` stays as it is.

    Args:
        files: Files of the checkpoint.
        components: Its components.
        platform: See `resolve_fields`. A checkpoint without components needs `action_decoding="parallel"` too, since
            a plain one has no platform. A checkpoint whose config states its fields must agree with the platform.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: As in `resolve_fields`, or the config states fields that the components or the platform contradict,
            or a platform is given for a plain checkpoint.
    """
    stored = files.read_json(CONFIG_NAME) or {}
    in_config = {name: stored[name] for name in OFT_FIELDS if name in stored}
    given = in_config | _given_fields(kwargs)
    if in_config and not components.files:
        _refuse_overrides(stored, kwargs, files.source)
    if in_config.get("action_decoding") == "parallel":
        if components.files and "vision_backbone_id" not in stored:  # our own layout, which has all weights
            component, name = next(iter(components.files.items()))
            raise ValueError(
                f"{files.source} has the weights of the {component} twice, in its safetensors files and in {name}: "
                f"delete {name}."
            )
        if not components.files:
            _refuse_other_platform(platform, in_config, files.source)
            return
    if not components.files and given.get("action_decoding") != "parallel":
        _refuse_platform_of_plain(platform, files.source)
        return
    resolved = resolve_fields(components, platform, given, files.source)
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        names = {one.name for one in fields(OpenVLAConfig)} - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in names.intersection(kwargs)}
        config = OpenVLAConfig.from_pretrained(config or files.source, **files.hub_kwargs, **overrides)
    for name, value in resolved.items():
        setattr(config, name, value)
    config.check_action_fields()
    kwargs["config"] = config


def _given_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the caller gave to `from_pretrained`, directly or through an Auto class."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        return {name: kwargs[name] for name in OFT_FIELDS if name in kwargs}
    defaults = {one.name: one.default for one in fields(OpenVLAConfig)}
    return {
        name: getattr(config, name)
        for name in OFT_FIELDS
        if name in config.given_fields or getattr(config, name) != defaults[name]
    }


def _refuse_overrides(stored: dict[str, Any], kwargs: dict[str, Any], source: Any) -> None:
    """Raise `ValueError` if the caller changes a field that the stored config states."""
    trained = {one.name: stored.get(one.name, one.default) for one in fields(OpenVLAConfig) if one.name in OFT_FIELDS}
    if "vision_backbone_id" in stored:  # only our own layout leaves out defaults
        trained = {name: value for name, value in trained.items() if name in stored}
    config = kwargs.get("config")
    asked = {name: getattr(config, name) for name in OFT_FIELDS} if isinstance(config, PreTrainedConfig) else kwargs
    for name, value in trained.items():
        if name in asked and asked[name] != value:
            raise ValueError(
                f"`{name}={asked[name]!r}` contradicts the {CONFIG_NAME} of {source}, whose policy was trained with "
                f"{name}={value!r}: leave out `{name}`."
            )


def _refuse_platform_of_plain(platform: str | None, source: Any) -> None:
    if platform is None:
        return
    check_name(platform, PLATFORMS, "`platform`")
    raise ValueError(
        f"{source} has no component files of OpenVLA-OFT, so `platform={platform!r}` does not apply. Leave it out for "
        "a plain OpenVLA checkpoint, or also pass `action_decoding='parallel'` if the policy was trained to predict "
        "the action tokens in parallel."
    )


def _refuse_other_platform(platform: str | None, stated: dict[str, Any], source: Any) -> None:
    """Raise `ValueError` if the fields that a config states are not those of the platform."""
    if platform is None:
        return
    check_name(platform, PLATFORMS, "`platform`")
    for name, value in PLATFORMS[platform].items():
        # A policy of the platform may also see only one image, or no state.
        if name in stated and stated[name] not in (value, WITHOUT_COMPONENTS.get(name, value)):
            raise ValueError(
                f"{source} states {name}={stated[name]!r} in its {CONFIG_NAME}, but the platform {platform!r} has "
                f"{value!r}: leave out `platform=`."
            )


@contextmanager
def report_muted(components: Components) -> Iterator[None]:
    """Mute transformers' report of missing weights if the components provide them."""
    of_loading = logging.get_logger("transformers.modeling_utils")

    def keep(record: LogRecord) -> bool:
        return not components.files or "LOAD REPORT" not in record.getMessage()

    of_loading.addFilter(keep)
    try:
        yield
    finally:
        of_loading.removeFilter(keep)


def place_components(model: nn.Module, components: Components, source: Any) -> set[str]:
    """Copy the weights of the components into a model, in the data type of the model, and return their names.

    Raises:
        ValueError: A weight has another shape than the model's, or its module is offloaded.
    """
    parameters = dict(model.named_parameters())
    weights = dict(components.weights)
    if components.backbone:
        where = f"{components.files['vision_backbone']} of {source}"
        path = PATHS["vision_backbone"]
        backbone = film_backbone_weights(model.get_submodule(path[:-1]), components.backbone, where)
        weights |= {f"{path}{name}": tensor for name, tensor in backbone.items()}
    for name, tensor in weights.items():
        component, path = next(one for one in PATHS.items() if name.startswith(one[1]))
        where = f"{components.files[component]} of {source}"
        parameter = parameters[name]
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{where} belongs to another model: {name.removeprefix(path)!r} has the shape {tuple(tensor.shape)} "
                f"instead of {tuple(parameter.shape)}."
            )
        if parameter.is_meta:
            raise ValueError(
                f"{where} can't be loaded into a module that `device_map` offloads: load the model on the CPU, save "
                "it with `save_pretrained`, and load the result with `device_map`."
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    return set(weights)


__all__ = [
    "HEAD_PREFIXES",
    "MODULES",
    "PARALLEL_PREFIX",
    "PATHS",
    "PLATFORMS",
    "SUFFIX",
    "Components",
    "complete_config",
    "component_files",
    "fitting_platforms",
    "place_components",
    "read_components",
    "report_muted",
    "resolve_fields",
]
