"""Imports of packages that only some installations have."""

import importlib
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        ImportError: The package is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{module.partition('.')[0]} is not installed: run `pip install 'openvla-hf[{extra}]'`."
        raise ImportError(message, name=error.name) from error


__all__ = ["import_extra"]
