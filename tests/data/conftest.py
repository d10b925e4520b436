import pytest

from openvla_hf.data.images import ImageReader


@pytest.fixture(autouse=True)
def cache(cache):
    """Give each test in this folder its own cache."""
    return cache


@pytest.fixture
def decoded(monkeypatch):
    """List the image references that are decoded in this process."""
    references = []
    read = ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda reader, reference: references.append(reference) or read(reader, reference)
    )
    return references


@pytest.fixture
def without_images(monkeypatch):
    """Skip decoding in tests that only count draws."""
    monkeypatch.setattr(ImageReader, "read", lambda reader, reference: None)
