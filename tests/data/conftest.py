import pytest

from openvla_hf.data import frames, loading


@pytest.fixture(autouse=True)
def cache(cache):
    """Every test of this folder has a cache of its own."""
    return cache


@pytest.fixture
def decoded(monkeypatch):
    """Every image reference that is decoded in this process."""
    references = []
    decode_image = frames.decode_image

    def decode(reference):
        references.append(reference)
        return decode_image(reference)

    monkeypatch.setattr(frames, "decode_image", decode)
    monkeypatch.setattr(loading, "decode_image", decode)
    return references
