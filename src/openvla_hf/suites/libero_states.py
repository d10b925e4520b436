"""The initial states of LIBERO's episodes."""

import pickle
from pathlib import Path

import numpy as np


def read_states(path: Path) -> np.ndarray:
    """Read the initial states (N, ...) of a task, which LIBERO keeps as a pickled array.

    Only arrays are unpickled, so that the file can't run code.

    Raises:
        ValueError: The file contains anything else.
    """
    import torch

    reconstruct = np.empty(0).__reduce__()[0]
    # LIBERO's files name the function as numpy 1 did.
    functions = [reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct")]
    allowed = [*functions, np.ndarray, np.dtype, type(np.dtype(np.float64))]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not an array of LIBERO's initial states: install hf-libero again.") from error


__all__ = ["read_states"]
