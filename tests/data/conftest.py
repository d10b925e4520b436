import pytest

from openvla_hf.data.images import ImageReader


@pytest.fixture(autouse=True)
def cache(cache):
    """Every test of this folder has a cache of its own."""
    return cache


@pytest.fixture
def decoded(monkeypatch):
    """Every image reference that is decoded in this process."""
    references = []
    read = ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda reader, reference: references.append(reference) or read(reader, reference)
    )
    return references
