"""Read files written by `torch.save` without running code from them."""

import os
import pickle
import zipfile
from typing import Any

import torch


# Errors that `torch.load` raises for damaged files.
DAMAGED = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, MemoryError)


def read_torch_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read the dictionary in a file written by `torch.save`.

    Tensors stay in the file until they are used, so the file may be larger than the memory.

    Args:
        path: An existing `.pt` file.

    Raises:
        ValueError: The file contains objects other than tensors and plain values, or not a dictionary.
        OSError: The file is damaged or was cut short.
    """
    # The list of contents is at the end of the file, so it is missing from a file that was cut short.
    if not zipfile.is_zipfile(path):
        raise OSError(
            f"{path} is damaged or was cut short, or was not written by `torch.save`: copy or download it again."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains more than tensors and plain values, so reading it could run code. Save only the tensors "
            "with `torch.save`."
        ) from error
    except DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"{path} is damaged ({reason}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a dictionary of tensors, got {type(content).__name__}.")
    return content


__all__ = ["read_torch_file"]
