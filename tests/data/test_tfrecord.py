import io

import numpy as np
import pytest

from openvla_hf.data import BadEpisodeError
from openvla_hf.data.readers.tfrecord import build_example, masked_crc, parse_example, read_records, write_record


def test_the_checksum_is_that_of_tfrecord():
    # CRC-32C of "123456789" is 0xE3069283 by its definition; the mask rotates by 15 bits and adds a constant.
    assert masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_records_come_back_with_their_place_in_the_file():
    file = io.BytesIO()
    payloads = [b"", b"one", bytes(5000)]
    for payload in payloads:
        write_record(file, payload)
    data = file.getvalue()
    file.seek(0)
    records = list(read_records(file, "file"))
    assert [payload for _, payload in records] == payloads
    assert all(data[offset : offset + len(payload)] == payload for offset, payload in records)


def test_examples_come_back():
    features = {
        "floats": np.linspace(-1, 1, 300, dtype=np.float32),
        "integers": np.array([0, 1, -1, 127, 128, 2**40, -(2**63), 2**63 - 1]),
        "images": [b"ab\x00\x00", b"", bytes(300)],
        "none": np.empty(0, np.float32),
    }
    payload = build_example(features)
    found = parse_example(payload, lambda name: True)
    np.testing.assert_array_equal(found["floats"], features["floats"])
    np.testing.assert_array_equal(found["integers"], features["integers"])
    assert [payload[start:end] for start, end in found["images"]] == features["images"]
    assert len(found["none"]) == 0
    assert set(parse_example(payload, {"floats"}.__contains__)) == {"floats"}


@pytest.mark.parametrize("payload", [b"\xff" * 20, b"\x0a\x7f", b"plain text"])
def test_bytes_that_are_not_an_example_are_refused(payload):
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        parse_example(payload, lambda name: True)


@pytest.mark.parametrize("cut", [1, 5, 11, 13, 30])
def test_a_cut_is_noticed_wherever_it_is(cut):
    file = io.BytesIO()
    write_record(file, b"whole")
    size = file.tell()
    write_record(file, b"this one is cut short")
    first, error = read_records(io.BytesIO(file.getvalue()[: size + cut]), "arm.tfrecord")
    assert first[1] == b"whole"
    assert isinstance(error, BadEpisodeError)
    assert "arm.tfrecord, record 1" in str(error)


def test_every_flipped_bit_is_noticed_and_later_records_are_read_if_they_can_be_found():
    file = io.BytesIO()
    write_record(file, b"first")
    size = file.tell()
    write_record(file, b"second")
    for position in range(size):
        data = bytearray(file.getvalue())
        data[position] ^= 0x10
        records = list(read_records(io.BytesIO(data), "file"))
        assert isinstance(records[0], BadEpisodeError)
        if position >= 12:
            assert records[1][1] == b"second"
        else:
            assert len(records) == 1
