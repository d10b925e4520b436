"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record is framed as: length (8 bytes, little-endian), masked CRC-32C of the length (4), payload, masked CRC-32C of
the payload (4). The payload of an episode is a protobuf map from feature names to lists of bytes, floats or integers.
"""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, cast

import numpy as np

from ..episodes import BadEpisodeError, RecordPlace
from ..optional_packages import import_extra


HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
# The first bytes of a GZIP file.
GZIP = b"\x1f\x8b"
CRC_MASK_DELTA = 0xA282EAD8

# Protobuf wire types, in the low three bits of a tag.
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
# Field numbers of tf.train.Feature.
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3

# Start and end of a value, in bytes from the start of its record's payload.
Span = tuple[int, int]


def masked_crc(data: bytes | memoryview) -> int:
    """Compute the CRC-32C of `data`, rotated and shifted as TFRecord stores it."""
    crc = import_extra("google_crc32c", "data").value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + CRC_MASK_DELTA) & 0xFFFFFFFF


def open_records(file: BinaryIO) -> tuple[BinaryIO, bool]:
    """Return the records of an open file, decompressed if it is a GZIP file, and whether it is compressed."""
    start = file.read(HEADER.size)
    file.seek(0)
    # The length of the first record may begin with the same two bytes, but then its checksum matches.
    if not start.startswith(GZIP) or (len(start) == HEADER.size and masked_crc(start[:8]) == HEADER.unpack(start)[1]):
        return file, False
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)), True


def read_records(
    file: BinaryIO, path: str, place: RecordPlace | None = None
) -> Iterator[tuple[int, bytes] | BadEpisodeError]:
    """Yield each record of an open file as (offset of its payload, payload), or the error if it is damaged.

    `place` says where to begin. It moves along, and is always the place of the next record.

    Reading continues after a payload with a wrong checksum. It ends at a damaged length or where the file is cut
    short, since no later record can be found.
    """
    place = place or RecordPlace()
    records = _read_records(file, path, place)
    while True:
        try:
            record = next(records, None)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            place.number += 1
            record = BadEpisodeError(f"{path}: the GZIP file is damaged ({error}). Download it again.")
        if record is None:
            return
        yield record


def _read_records(file: BinaryIO, path: str, place: RecordPlace) -> Iterator[tuple[int, bytes] | BadEpisodeError]:
    file.seek(place.offset)
    while header := file.read(HEADER.size):
        where = f"{path}, record {place.number} (byte {place.offset})"
        payload, footer, problem = b"", b"", ""
        if len(header) == HEADER.size:
            length, length_crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != length_crc:
                problem = "the length's checksum is wrong, so the rest of the file can't be read."
            else:
                payload, footer = file.read(length), file.read(FOOTER.size)
        # The place moves only after everything is read, so that another attempt begins at a record that failed.
        place.number += 1
        if problem or len(footer) < FOOTER.size:
            yield BadEpisodeError(f"{where}: {problem or 'the file is cut short. Download it again.'}")
            return
        start = place.offset + HEADER.size
        place.offset = start + length + FOOTER.size
        if masked_crc(payload) != FOOTER.unpack(footer)[0]:
            yield BadEpisodeError(f"{where}: the checksum is wrong. Download the file again.")
        else:
            yield start, payload


def write_record(file: BinaryIO, payload: bytes) -> None:
    """Append one record to an open file."""
    length = struct.pack("<Q", len(payload))
    file.write(length + FOOTER.pack(masked_crc(length)))
    file.write(payload)
    file.write(FOOTER.pack(masked_crc(payload)))


def parse_example(payload: bytes, names: Callable[[str], bool]) -> dict[str, np.ndarray | list[Span]]:
    """Read the features of a `tf.train.Example` for whose names `names` returns `True`.

    Returns:
        By name, a float32 or int64 array (n,), or for bytes the spans of the values in `payload`.

    Raises:
        ValueError: The payload is not a `tf.train.Example`.
    """
    found: dict[str, np.ndarray | list[Span]] = {}
    try:
        for number, features in _fields(payload, (0, len(payload))):
            if number != 1:
                raise IndexError
            for _, entry in _fields(payload, features):
                (_, key), *value = _fields(payload, entry)
                name = payload[slice(*key)].decode()
                if names(name) and value:
                    found[name] = _read_feature(payload, value[0][1])
    except (IndexError, ValueError) as error:
        raise ValueError("the record is not a tf.train.Example.") from error
    return found


def _read_feature(payload: bytes, feature: Span) -> np.ndarray | list[Span]:
    kind, value = next(_fields(payload, feature), (BYTES_LIST, (0, 0)))
    if kind == BYTES_LIST:
        return [span for _, span in _fields(payload, value)]
    # Numbers are packed, usually in one run; an empty list has no run.
    runs = [np.frombuffer(payload, np.uint8, end - start, start) for _, (start, end) in _fields(payload, value)]
    packed = np.concatenate(runs) if runs else np.empty(0, np.uint8)
    return packed.view("<f4") if kind == FLOAT_LIST else _unpack_varints(packed)


def _unpack_varints(packed: np.ndarray) -> np.ndarray:
    """Decode integers of seven bits per byte, lowest first. The high bit marks that another byte follows."""
    if not len(packed):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.concatenate(([True], packed[:-1] < 0x80)))
    place = np.arange(len(packed)) - np.repeat(starts, np.diff(np.append(starts, len(packed))))
    bits = (packed & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, starts).view(np.int64)


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield the number and the span of each field of a message."""
    at, end = span
    while at < end:
        tag = data[at]
        at += 1
        wire_type = tag & 7
        if wire_type == DELIMITED:
            size = data[at]
            at += 1
            if size >= 0x80:
                size, at = _read_varint(data, at - 1)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            size = _read_varint(data, at)[1] - at
        if tag >= 0x80 or wire_type not in (VARINT, FIXED64, DELIMITED, FIXED32) or at + size > end:
            raise IndexError
        yield tag >> 3, (at, at + size)
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def build_example(features: Mapping[str, np.ndarray | Sequence[bytes]]) -> bytes:
    """Build a `tf.train.Example` from float and integer arrays and lists of bytes."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            kind, content = FLOAT_LIST, _delimited(1, np.ascontiguousarray(values, "<f4").tobytes())
        elif isinstance(values, np.ndarray):
            kind, content = INT64_LIST, _delimited(1, b"".join(_varint(int(value)) for value in values.ravel()))
        else:
            kind, content = BYTES_LIST, b"".join(_delimited(1, value) for value in values)
        entries += _delimited(1, _delimited(1, name.encode()) + _delimited(2, _delimited(kind, content)))
    return _delimited(1, entries)


def _delimited(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | DELIMITED]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


__all__ = [
    "Span",
    "build_example",
    "masked_crc",
    "open_records",
    "parse_example",
    "read_records",
    "write_record",
]
