"""Arrays in messages: msgpack as openpi writes it, and JSON as json-numpy writes it.

Messages come from strangers. Arrays have a dtype from a list, as many bytes as their shape needs, and never contain
Python objects.
"""

import base64
import json
import math
from typing import Any

import msgpack
import numpy as np


_NUMBERS = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
DTYPES = frozenset(["|b1", "|i1", "|u1", *(order + number for order in "<>" for number in _NUMBERS)])
"""Names of the dtypes that messages may contain."""
MAX_DIMENSIONS = 8
MAX_NESTING = 16
MAX_ENTRIES = 10_000
"""Largest number of containers and of their entries in a message, other than the elements of arrays."""
MAX_CONTAINER = 1024
"""Largest number of entries of a list or a map. msgpack allocates memory for all entries before it reads them."""


class _Refused(ValueError):
    """An error whose message is written for clients, unlike the errors of the parsers."""


def unpack(data: bytes) -> Any:
    """Decode a msgpack message with arrays in openpi's form.

    Returns:
        The message. Its arrays are writable, contiguous and in native byte order.

    Raises:
        ValueError: The message is damaged or exceeds a limit, or an array in it is not valid.
    """
    left = MAX_ENTRIES

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1 + len(container)
        if left < 0:
            raise _too_many_entries()
        return container

    try:
        message = msgpack.unpackb(
            data,
            object_hook=lambda entries: _read_msgpack(count(entries)),
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=MAX_CONTAINER,
            max_map_len=MAX_CONTAINER,
        )
    except _Refused:
        raise
    except ValueError as error:
        detail = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"The message is not valid msgpack: {detail}.") from error
    _check_values(message, MAX_NESTING)
    return message


def pack(message: Any) -> bytes:
    """Encode a message as msgpack, with arrays in openpi's form.

    Raises:
        TypeError: A value has a type that messages can't contain.
        ValueError: An array has a dtype that messages can't contain.
    """
    return msgpack.packb(message, default=_write_msgpack)


def load_json(text: str | bytes) -> Any:
    """Decode a JSON message with arrays in json-numpy's form.

    Returns:
        The message. Its arrays are writable, contiguous and in native byte order.

    Raises:
        ValueError: The message is damaged or exceeds a limit, or an array in it is not valid.
    """
    check_entries(text)
    try:
        message = json.loads(text, object_hook=_read_json)
    except _Refused:
        raise
    except ValueError as error:
        raise ValueError(f"The message is not valid JSON: {str(error).rstrip('.')}.") from error
    except RecursionError:
        raise _too_nested() from None
    _check_values(message, MAX_NESTING)
    return message


def check_entries(text: str | bytes) -> None:
    """Raise `ValueError` if JSON has too many entries to parse it: a list takes much more memory than its text."""
    # Base64 has none of these characters.
    marks: tuple[Any, ...] = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if sum(map(text.count, marks)) > MAX_ENTRIES:
        raise _too_many_entries()


def dump_json(message: Any, separators: tuple[str, str] = (", ", ": ")) -> str:
    """Encode a message as JSON, with arrays in json-numpy's form.

    Args:
        message: The message.
        separators: Text between entries, and between a key and its value.

    Raises:
        TypeError: A value has a type that messages can't contain.
        ValueError: An array has a dtype that messages can't contain.
    """
    return json.dumps(message, default=_write_json, separators=separators)


def _read_msgpack(entries: dict[Any, Any]) -> Any:
    """Replace a map that stands for an array or a numpy scalar."""
    if b"__ndarray__" in entries:
        return _make_array(entries.get(b"data"), entries.get(b"dtype"), entries.get(b"shape"))
    if b"__npgeneric__" in entries:
        return _make_scalar(entries.get(b"data"), entries.get(b"dtype"))
    return entries


def _write_msgpack(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"Messages can't contain a {type(value).__name__}.")
    name = _name_dtype(value)
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": name}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": name, b"shape": value.shape}


def _read_json(entries: dict[str, Any]) -> Any:
    """Replace an object that stands for an array; one without dimensions is a scalar."""
    if "__numpy__" not in entries:
        return entries
    encoded = entries["__numpy__"]
    if not isinstance(encoded, str):
        raise _Refused(f"The data of an array must be a base64 string, got {_describe(encoded)}.")
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise _Refused(f"The data of an array is not valid base64: {error}.") from error
    array = _make_array(data, entries.get("dtype"), entries.get("shape"))
    return array if array.ndim else array[()]


def _write_json(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"Messages can't contain a {type(value).__name__}.")
    data = base64.b64encode(value.tobytes()).decode()
    return {"__numpy__": data, "dtype": _name_dtype(value), "shape": value.shape}


def _name_dtype(value: np.ndarray | np.generic) -> str:
    if value.dtype.str not in DTYPES:
        raise ValueError(f"Messages can't contain arrays of dtype {value.dtype}.")
    return value.dtype.str


def _make_array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """Make an array from its parts, none of which is checked yet."""
    name = _check_dtype(dtype)
    if not isinstance(data, bytes):
        raise _Refused(f"The data of an array must be bytes, got {_describe(data)}.")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise _Refused(f"The shape of an array must be a list of at most {MAX_DIMENSIONS} sizes.")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise _Refused(f"The shape of an array must consist of positive integers, got {_describe(shape)}.")
    stored = np.dtype(name)
    if math.prod(shape) * stored.itemsize != len(data):
        raise _Refused(
            f"An array of shape {tuple(shape)} and dtype {name!r} takes {math.prod(shape) * stored.itemsize} bytes, "
            f"got {len(data)}."
        )
    # A byte other than 0 and 1 would give a boolean that is neither true nor false.
    flat = np.frombuffer(data, np.uint8 if name == "|b1" else stored)
    return flat.reshape(shape).astype(stored.newbyteorder("="))


def _make_scalar(value: Any, dtype: Any) -> np.generic:
    """Make a numpy scalar from its parts, none of which is checked yet."""
    stored = np.dtype(_check_dtype(dtype)).newbyteorder("=")
    if stored.kind == "b":
        fits = isinstance(value, bool)
    elif stored.kind == "f":
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        limits = np.iinfo(stored)
        fits = isinstance(value, int) and not isinstance(value, bool) and limits.min <= value <= limits.max
    if not fits:
        raise _Refused(f"A scalar of dtype {dtype!r} can't be {_describe(value)}.")
    with np.errstate(over="ignore"):
        return stored.type(value)


def _check_dtype(dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"An array has dtype {_describe(dtype)}: send numbers or booleans of 1 to 8 bytes.")
    return dtype


def _check_values(value: Any, levels: int) -> None:
    """Refuse containers nested in more than `levels` levels, and unpaired surrogates, which JSON can contain."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Refused("The message contains text that is not valid Unicode.") from error
    elif isinstance(value, dict | list):
        if levels == 0:
            raise _too_nested()
        for entry in value:
            _check_values(entry, levels - 1)
        for entry in value.values() if isinstance(value, dict) else ():
            _check_values(entry, levels - 1)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise _Refused(f"The message has a value of the msgpack extension {code}, which this server does not know.")


def _too_many_entries() -> ValueError:
    return _Refused(
        f"The message has more than {MAX_ENTRIES} entries in lists and maps: send images and states as arrays."
    )


def _too_nested() -> ValueError:
    return _Refused(f"The message nests lists and maps in more than {MAX_NESTING} levels.")


def _describe(value: Any) -> str:
    """Describe a value in a few characters. Containers may be nested too deeply for `repr`."""
    if isinstance(value, str | bytes | int | float | None):
        text = repr(value) if not isinstance(value, str | bytes) else repr(value[:40])
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


__all__ = ["DTYPES", "check_entries", "dump_json", "load_json", "pack", "unpack"]
