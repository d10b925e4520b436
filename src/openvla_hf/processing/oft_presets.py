"""Cameras and states of OpenVLA-OFT's platforms, which no published file contains."""

import json
import os
from collections.abc import Collection, Mapping
from fnmatch import filter as match
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import tqdm
from transformers.utils import CONFIG_NAME, hf_api
from transformers.utils.hub import httpx, is_offline_mode

from .image_processing_openvla import LANCZOS3, find_file
from .observations import suggest


STATISTICS_FILE = "dataset_statistics.json"
PROPRIO_PROJECTOR = "proprio_projector--*"
COMPONENTS = ("action_head--*", PROPRIO_PROJECTOR, "noisy_action_projector--*", "vision_backbone--*")
# How the original prepares images in evaluation.
IMAGE_FIELDS = {"resample": LANCZOS3, "center_crop_area": 0.9}


# Values of `action_decoding` in the model's config.
DECODING = ("autoregressive", "parallel")


class Platform(NamedTuple):
    """Dimensions of a platform's actions and states, and its cameras in the order of the model's images."""

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]


PLATFORMS = {
    "libero": Platform(7, 8, ("full_image", "wrist_image")),
    "aloha": Platform(14, 14, ("full_image", "left_wrist_image", "right_wrist_image")),
    "bridge": Platform(7, 7, ("full_image",)),
}


def find_platform(name: str | None) -> Platform | None:
    """Look up a platform by its name; raise `ValueError` if the name is unknown."""
    if name is None:
        return None
    if name not in PLATFORMS:
        raise ValueError(
            f"Unknown platform {name!r}.{suggest(name, PLATFORMS)} Choose from {', '.join(map(repr, PLATFORMS))}."
        )
    return PLATFORMS[name]


def is_parallel(given: str | None, config: Mapping[str, Any]) -> bool:
    """Return whether a policy decodes in parallel, according to `action_decoding=` or else the checkpoint's config.

    Raises:
        ValueError: The given kind of decoding is unknown.
    """
    if given is not None and given not in DECODING:
        raise ValueError(
            f"Unknown `action_decoding` {given!r}.{suggest(given, DECODING)} Choose from "
            f"{', '.join(map(repr, DECODING))}."
        )
    return (given or config.get("action_decoding")) == "parallel"


def read_oft_fields(
    source: str | os.PathLike, platform: str | None, parallel: bool, given: Collection[str], **hub_kwargs: Any
) -> dict[str, Any]:
    """Return the processor's fields for published files, which may be those of OpenVLA-OFT.

    Args:
        source: Folder or Hub id.
        platform: Name of a platform. By default, the one whose dimensions the checkpoint's statistics have.
        parallel: Whether the policy is known to decode in parallel. If so, and without component files, it predicts
            tokens from the platform's first camera, without the state.
        given: Names of the fields that the caller gives, which are not looked up.
        hub_kwargs: `revision`, `token` and so on.

    Returns:
        `cameras`, `state_dim` and the fields of the image processor; empty for a plain checkpoint.

    Raises:
        ValueError: The platform is unknown, does not follow from the statistics, or is given for a plain checkpoint.
        OSError: It is unknown which files the checkpoint has.
    """
    preset = find_platform(platform)
    files = list_files(source, **hub_kwargs)
    has_components = any(match(files, pattern) for pattern in COMPONENTS)
    if not (has_components or parallel):
        if platform is not None:
            raise ValueError(f"{source} has no component files of OpenVLA-OFT, {_platform_of_plain(platform)}")
        return {}
    fields: dict[str, Any] = {"image_processor": IMAGE_FIELDS}
    if "cameras" not in given:
        if has_components:
            preset = preset or _recognize(source, **hub_kwargs)
        if preset is not None:
            fields["cameras"] = list(preset.cameras if has_components else preset.cameras[:1])
    if "state_dim" not in given and match(files, PROPRIO_PROJECTOR):
        fields["state_dim"] = preset.state_dim if preset else _read_dims(source, **hub_kwargs)[1]
    return fields


def check_saved_fields(
    source: str | os.PathLike, platform: str | None, parallel: bool, saved: Mapping[str, Any]
) -> None:
    """Raise `ValueError` if the given platform contradicts a saved processor.

    Args:
        source: Folder or Hub id.
        platform: Name of a platform.
        parallel: Whether the policy is known to decode in parallel.
        saved: Content of the processor's file, which the platform does not change.
    """
    preset = find_platform(platform)
    if preset is None:
        return
    cameras, state_dim = saved.get("cameras"), saved.get("state_dim")
    if cameras is None and state_dim is None and not parallel:
        raise ValueError(
            f"The processor of {source} was saved for one image without a state, {_platform_of_plain(platform)}"
        )
    num_cameras = len(cameras or [None])
    # A policy of the platform may also have only one camera, or no state.
    if num_cameras not in (1, len(preset.cameras)) or state_dim not in (None, preset.state_dim):
        raise ValueError(
            f"The processor of {source} was saved with {num_cameras} cameras and {state_dim or 'no'} state "
            f"dimensions, but the platform {platform!r} has {len(preset.cameras)} and {preset.state_dim}: leave out "
            "`platform=`."
        )


def _platform_of_plain(platform: str | None) -> str:
    return (
        f"so `platform={platform!r}` does not apply. Leave it out for a plain OpenVLA checkpoint, or also pass "
        "`action_decoding='parallel'` if the policy was trained to predict the action tokens in parallel."
    )


def list_files(source: str | os.PathLike, **hub_kwargs: Any) -> list[str]:
    """List the names of the files next to a checkpoint's `config.json`.

    The cache keeps the Hub's list of a commit. In offline mode without this list, only the cached files are listed.

    Raises:
        OSError: The Hub refuses the list or does not answer.
    """
    config_file = find_file(source, CONFIG_NAME, **hub_kwargs)
    if config_file is None:
        return []
    if os.path.isdir(source):
        return os.listdir(os.path.dirname(config_file))
    source = str(source)
    beside = PurePosixPath(hub_kwargs.get("subfolder") or "")
    options = {name: hub_kwargs.get(name) for name in ("revision", "cache_dir")}
    if not (hub_kwargs.get("local_files_only") or is_offline_mode()):
        try:
            # The only public function that caches the list of files. The file that it fetches is already cached.
            hf_api().snapshot_download(
                source,
                **options,
                token=hub_kwargs.get("token"),
                allow_patterns=[str(beside / CONFIG_NAME)],
                tqdm_class=_NoBar,
            )
        except (OSError, httpx.HTTPError) as error:
            raise _unknown_files(source, error) from error
    try:
        paths = [PurePosixPath(file.path) for file in get_cached_repo_tree(source, **options)]
    except CachedRepoTreeNotFoundError as error:
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return os.listdir(os.path.dirname(config_file))
        raise _unknown_files(source, error) from error
    return [path.name for path in paths if path.parent == beside]


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"disable": True})


def _unknown_files(source: str, error: Exception) -> OSError:
    reason = " ".join(str(error.__cause__ or error).split())
    return OSError(
        f"Cannot read the list of files of {source}, which shows whether it is an OpenVLA-OFT checkpoint: the Hub "
        f"refuses the list or does not answer ({reason}). Check your access and the network, or set "
        "HF_HUB_OFFLINE=1 to use the cached files."
    )


def _recognize(source: str | os.PathLike, **hub_kwargs: Any) -> Platform:
    """Find the platform that has the dimensions of a checkpoint's statistics."""
    action_dim, state_dim = _read_dims(source, **hub_kwargs)
    for preset in PLATFORMS.values():
        if (preset.action_dim, preset.state_dim) == (action_dim, state_dim):
            return preset
    raise ValueError(
        f"The cameras of {source} are unknown: its {STATISTICS_FILE} has {action_dim} action and {state_dim} state "
        "dimensions, which no platform has. Pass `cameras=` with their names in order, or `platform=` "
        f"({', '.join(map(repr, PLATFORMS))})."
    )


def _read_dims(source: str | os.PathLike, **hub_kwargs: Any) -> tuple[int, int]:
    """Read the numbers of action and state dimensions from a checkpoint's statistics."""
    path = find_file(source, STATISTICS_FILE, **hub_kwargs)
    if path is None:
        raise ValueError(
            f"The cameras and the state of {source} are unknown, since it has no {STATISTICS_FILE}: pass `platform=` "
            f"({', '.join(map(repr, PLATFORMS))}), or `cameras=` and `state_dim=`."
        )
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy or download it again.") from error
    try:
        dims = {tuple(len(row[name]["q01"]) for name in ("action", "proprio")) for row in rows.values()}
        ((action_dim, state_dim),) = dims
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The {STATISTICS_FILE} of {source} does not have the same number of action and proprio dimensions for "
            "all datasets: pass `platform=`, or `cameras=` and `state_dim=`."
        ) from error
    return action_dim, state_dim


__all__ = ["IMAGE_FIELDS", "PLATFORMS", "Platform", "check_saved_fields", "is_parallel", "read_oft_fields"]
