"""Files written by `torch.save` are read as data: no code in them runs, and errors name damaged files."""

import os
import zipfile

import pytest
import torch

from openvla_hf.modeling.torch_files import read_torch_file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.arange(10_000.0), "step": 3}, path)
    return path


def test_tensors_and_plain_values_come_back(file):
    content = read_torch_file(file)
    assert content["step"] == 3
    assert torch.equal(content["weight"], torch.arange(10_000.0))


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_does_not_run(tmp_path):
    path, touched = tmp_path / "weights.pt", tmp_path / "touched"
    torch.save({"weight": torch.ones(2), "more": Touch(touched)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt contains more than tensors"):
        read_torch_file(path)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists(), "the file is harmless, so this test proves nothing"


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_short_is_refused(file, kept):
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(OSError, match=r"weights\.pt is damaged or was cut short"):
        read_torch_file(file)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_text("not weights")
    with pytest.raises(OSError, match=r"was not written by `torch\.save`"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "nothing")
    with pytest.raises(OSError, match=r"weights\.pt is damaged"):
        read_torch_file(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="must contain a dictionary of tensors, got list"):
        read_torch_file(path)


def test_any_damage_to_the_pickle_is_an_error_or_harmless(file):
    """Bytes of the pickle are changed one by one."""
    data = bytearray(file.read_bytes())
    start = data.index(b"\x80\x02")
    for position in range(start, start + 200):
        changed = data.copy()
        changed[position] ^= 0xFF
        file.write_bytes(changed)
        try:
            assert isinstance(read_torch_file(file), dict)
        except (OSError, ValueError) as error:
            assert "weights.pt" in str(error)  # noqa: PT017
