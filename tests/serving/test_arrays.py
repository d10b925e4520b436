import base64
import json

import json_numpy
import msgpack
import numpy as np
import pytest

from openvla_hf.serving.arrays import DTYPES, MAX_ENTRIES, dump_json, load_json, pack, unpack


def array_of(dtype):
    return np.arange(6).reshape(2, 3).astype(dtype)


def in_msgpack(**parts):
    """An array in openpi's form, of which `parts` are other than they should be."""
    entries = {"__ndarray__": True, "data": bytes(24), "dtype": "<f4", "shape": [2, 3]} | parts
    return msgpack.packb({key.encode(): value for key, value in entries.items()})


def in_json(**parts):
    entries = {"__numpy__": base64.b64encode(bytes(24)).decode(), "dtype": "<f4", "shape": [2, 3]} | parts
    return json.dumps(entries)


# The maps of {"a": array}, byte by byte: the maps of one and of four entries, and strings of bytes.
SPELLED_OUT = (
    b"\x81\xa1a\x84"
    b"\xc4\x0b__ndarray__\xc3"
    b"\xc4\x04data\xc4\x04\x01\x00\x02\x00"
    b"\xc4\x05dtype\xa3<u2"
    b"\xc4\x05shape\x92\x02\x01"
)


def test_msgpack_has_openpis_bytes():
    array = np.array([[1], [2]], "<u2")
    assert pack({"a": array}) == SPELLED_OUT
    np.testing.assert_array_equal(unpack(SPELLED_OUT)["a"], array)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_arrays_of_every_dtype_arrive_in_native_order_and_writable(dtype):
    for arrived in (unpack(pack(array_of(dtype))), load_json(dump_json(array_of(dtype)))):
        np.testing.assert_array_equal(arrived, array_of(dtype))
        assert arrived.dtype == np.dtype(dtype).newbyteorder("=")
        assert arrived.dtype.isnative
        assert arrived.flags.writeable
        assert arrived.flags.c_contiguous


@pytest.mark.parametrize("order", ["C", "F", "view"])
def test_the_memory_layout_of_a_sent_array_does_not_matter(order):
    array = array_of("f4").T if order == "view" else np.asarray(array_of("f4"), order=order)
    for arrived in (unpack(pack(array)), load_json(dump_json(array)), json_numpy.loads(dump_json(array))):
        np.testing.assert_array_equal(arrived, array)


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.uint8(255), np.int64(-(2**63)), np.bool(True), np.float16(3)])
def test_scalars_keep_their_dtype(scalar):
    for arrived in (unpack(pack(scalar)), load_json(dump_json(scalar)), load_json(json_numpy.dumps(scalar))):
        assert arrived == scalar
        assert arrived.dtype == scalar.dtype


def test_json_is_that_of_json_numpy():
    message = {"image": array_of("u1"), "action": [array_of("f8"), np.float32(1)], "instruction": "grün", "none": None}
    assert dump_json(message) == json_numpy.dumps(message)
    ours, theirs = load_json(json_numpy.dumps(message)), json_numpy.loads(dump_json(message))
    for one in (ours, theirs):
        np.testing.assert_array_equal(one["image"], message["image"])
        np.testing.assert_array_equal(one["action"][0], message["action"][0])
        assert (one["action"][1], one["instruction"], one["none"]) == (1, "grün", None)


def test_an_array_without_dimensions_is_an_array_in_msgpack():
    assert unpack(pack(np.array(2.5))).shape == ()


FAULTS = [
    ({"dtype": "|O"}, "dtype '|O'"),
    ({"dtype": "<c8"}, "dtype '<c8'"),
    ({"dtype": "|V4"}, "dtype"),
    ({"dtype": "<U1"}, "dtype"),
    ({"dtype": "<M8[s]"}, "dtype"),
    ({"dtype": "object"}, "dtype"),
    ({"dtype": [["x", "<f4"]]}, "dtype a list"),
    ({"dtype": None}, "dtype None"),
    ({"shape": [2, 2]}, r"shape \(2, 2\) and dtype '<f4' takes 16 bytes, got 24"),
    ({"shape": [2**40, 2**40]}, "takes .* bytes, got 24"),
    ({"shape": [-2, -3]}, "positive integers"),
    ({"shape": [0, 2**62]}, "positive integers"),
    ({"shape": [True, 6]}, "positive integers"),
    ({"shape": [2.0, 3]}, "positive integers"),
    ({"shape": 6}, "must be a list"),
    ({"shape": [1] * 9}, "at most 8"),
    ({"shape": None}, "must be a list"),
]


@pytest.mark.parametrize(("parts", "message"), FAULTS)
@pytest.mark.parametrize(("read", "write"), [(unpack, in_msgpack), (load_json, in_json)])
def test_an_array_that_is_not_what_it_says_is_refused(read, write, parts, message):
    assert read(write()).shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        read(write(**parts))


@pytest.mark.parametrize("data", ["text", None, 24, [0] * 24])
def test_the_data_of_an_array_must_be_bytes(data):
    with pytest.raises(ValueError, match="must be bytes"):
        unpack(in_msgpack(data=data))


@pytest.mark.parametrize("data", [None, 24, [0], "AA", "A A=", "ä"])
def test_the_data_of_an_array_in_json_must_be_base64(data):
    with pytest.raises(ValueError, match="base64"):
        load_json(in_json(__numpy__=data))


@pytest.mark.parametrize(
    ("dtype", "value"), [("|u1", 256), ("|u1", -1), ("<i4", 1.5), ("<f4", True), ("<f4", "1"), ("|b1", 1), ("|O", 1)]
)
def test_a_scalar_must_fit_its_dtype(dtype, value):
    with pytest.raises(ValueError, match="dtype"):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype}))


def test_bytes_other_than_0_and_1_are_true():
    arrived = unpack(in_msgpack(data=bytes([0, 1, 2, 255]), dtype="|b1", shape=[4]))
    assert arrived.tobytes() == bytes([0, 1, 1, 1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack: FormatError"),
        (SPELLED_OUT[:-1], "incomplete input"),
        (SPELLED_OUT + b"\xc0", "extra data"),
        (b"\xa2\xff\xff", "not valid msgpack"),
        (b"\x81\x01\x01", "not allowed for map key"),
        (b"\x91" * 20 + b"\xc0", "more than 16 levels"),
        (b"\x91" * 5000 + b"\xc0", "not valid msgpack: StackError"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\x9f" + (b"\xdc\x03\xff" + b"\x80" * 1023) * 15, f"more than {MAX_ENTRIES} entries"),
        (b"\xd4\x05a", "extension 5"),
    ],
)
def test_a_msgpack_message_that_is_damaged_or_too_large_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        unpack(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"image": ', "not valid JSON"),
        (b'{"image": "\xff"}', "not valid JSON"),
        ("[" * 20 + "]" * 20, "more than 16 levels"),
        ("[" * 9000, "more than 16 levels"),
        (b"[" * 100_000, f"more than {MAX_ENTRIES} entries"),
        (json.dumps([0] * (MAX_ENTRIES + 1)), f"more than {MAX_ENTRIES} entries"),
        ("1" * 5000, "not valid JSON"),
        ('{"instruction": "\\ud800"}', "not valid Unicode"),
        ('{"\\ud800": 1}', "not valid Unicode"),
    ],
)
def test_a_json_message_that_is_damaged_or_too_large_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_json(text)


@pytest.mark.parametrize("write", [pack, dump_json])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.array([object()]), ValueError),
        (np.array([1j]), ValueError),
        (np.array(["a"]), ValueError),
        ({1}, TypeError),
    ],
)
def test_what_a_message_cannot_contain_is_not_sent(write, value, error):
    with pytest.raises(error, match="can't contain"):
        write(value)
