"""One error message for every unknown name."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any


# Longer lists, such as all fields of `TrainingArguments`, would hide the rest of the message.
LONGEST_LIST = 30


def check_name(name: Any, known: Iterable[str], kind: str) -> None:
    """Require that a name is known.

    Args:
        name: The name to check.
        known: All valid names.
        kind: What the name stands for, such as "recipe".

    Raises:
        ValueError: The name is unknown. The message suggests the closest name and lists all of them.
    """
    known = list(known)
    if name not in known:
        raise unknown_name(repr(name), known, kind, nearest_to=str(name))


def unknown_name(text: str, known: Collection[str], kind: str, nearest_to: str) -> ValueError:
    """Build the error for an unknown name, which the message shows as `text`."""
    near = difflib.get_close_matches(nearest_to, known, n=1, cutoff=0.5)
    message = f"Unknown {kind} {text}."
    if near:
        message += f" Did you mean {near[0]!r}?"
    if not known:
        message += " None are available."
    elif len(known) <= LONGEST_LIST:
        message += f" Choose from {', '.join(map(repr, known))}."
    return ValueError(message)


__all__ = ["check_name", "unknown_name"]
