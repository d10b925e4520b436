"""Serve a policy to robots, and ask a served policy for actions.

Importing this package, or its client, does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .client import Client, ServerError
    from .safety import SafetyLimits, UnsafeAction


_MODULES = {"Client": "client", "ServerError": "client", "SafetyLimits": "safety", "UnsafeAction": "safety"}


def __getattr__(name: str) -> Any:
    """Import a public class on first use, since the client needs httpx."""
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Client", "SafetyLimits", "ServerError", "UnsafeAction"]
