"""Write a folder as a whole: an interrupted save leaves either the old checkpoint or one that does not load."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from .checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OFT_FILES, STATISTICS_FILE


# Prefix of folders that are being written. Uploads to the Hub skip names that begin with "_".
UNFINISHED = "_unfinished"
# A checkpoint does not load without its config, so configs are removed first and written last.
CONFIGS = (CONFIG_NAME, ADAPTER_CONFIG)
WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors")
INDEX = re.compile(r"(?P<stem>.+?)\.safetensors\.index(?P<variant>\.[^.]+)?\.json")


@contextmanager
def written_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to write files into, and move them into `folder` at the end.

    If writing fails, `folder` stays as it was. If the process ends while files are moved, the config is missing and
    `folder` does not load. Earlier weights and statistics that the new files replace are removed. A whole checkpoint
    also replaces an earlier adapter and the components of OpenVLA-OFT.

    Args:
        folder: New or existing folder. Other files in an existing folder are kept.

    Raises:
        OSError: A file can't be written, as on a full disk, or an adapter would be saved next to a whole checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give a folder to save in.")
    parent = folder if folder.exists() else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f"{UNFINISHED}-{uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield aside
        names = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
        _make_readable(aside, names)
        if names and not folder.exists():
            aside.rename(folder)
        elif names:
            _take_places(aside, folder, names)
    except SafetensorError as error:  # how safetensors reports system errors
        raise OSError(f"{folder} can't be written ({error}): free some space, or give another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_readable(aside: Path, names: list[str]) -> None:
    """Give weights the permissions of other new files, since safetensors makes them readable by the owner only."""
    like = aside / uuid4().hex
    like.touch()
    mode = like.stat().st_mode
    like.unlink()
    for name in names:
        if name.endswith(".safetensors"):
            (aside / name).chmod(mode)


def _take_places(aside: Path, folder: Path, names: list[str]) -> None:
    configs = [name for name in CONFIGS if name in names]
    if configs == [ADAPTER_CONFIG] and (folder / CONFIG_NAME).exists():
        raise FileExistsError(
            f"{folder} contains a whole checkpoint, and an adapter saved there would be applied to it. Save the "
            "adapter in another folder."
        )
    stems = {_stem(name) for name in names} - {None}
    if CONFIG_NAME in configs and stems:  # an earlier adapter would be applied to this checkpoint
        stems.add(_stem(ADAPTER_WEIGHTS))
        (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        for component in (path for pattern in OFT_FILES for path in folder.glob(pattern)):
            component.unlink()
    for name in configs:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        is_replaced = _stem(path.name) in stems or (stems and path.name == STATISTICS_FILE)
        if is_replaced and path.name not in names:
            path.unlink()
    for name in sorted(names, key=lambda name: (name in configs, _stem(name) is not None)):  # configs last
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (aside / name).replace(folder / name)


def _stem(name: str) -> str | None:
    """Return the common name of weights files and their index ("model", "model.fp16", "adapter_model"), or `None`."""
    if match := INDEX.fullmatch(name):
        return match["stem"] + (match["variant"] or "")
    match = WEIGHTS.fullmatch(name)
    return match["stem"] if match else None


__all__ = ["UNFINISHED", "written_whole"]
