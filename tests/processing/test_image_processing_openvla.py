import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from openvla_hf.processing import OpenVLAImageProcessor, image_processing_openvla


VARIANTS = ["resize-crop-fused", "resize-crop-fused-f32stats", "letterbox-fused", "resize-naive-siglip"]
STRATEGIES = ["resize-naive", "letterbox", "resize-crop"]


@pytest.fixture
def processor():
    return OpenVLAImageProcessor()


def strided(pixels, expected):
    """Cut pixels to the recorded grid, which has all pixels in the full recordings."""
    stride = pixels.shape[-1] // expected.shape[-1]
    return pixels[..., ::stride, ::stride]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_original_bit_for_bit(recordings, variant):
    folder = recordings("image-processor")
    cases = json.loads((folder / "cases.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    processor = OpenVLAImageProcessor.from_pretrained(folder / variant)
    indices = cases["variants"][variant]["images"]
    batch = processor([Image.open(folder / cases["images"][index]) for index in indices])["pixel_values"]
    for index, pixels in zip(indices, batch, strict=True):
        assert torch.equal(strided(pixels, expected[f"{variant}.{index}"]), expected[f"{variant}.{index}"])


@pytest.mark.parametrize("case", ["fused-224", "siglip-224", "sharded"])
def test_published_checkpoint(recordings, case):
    processor = AutoImageProcessor.from_pretrained(recordings(case) / "checkpoint")
    whole = "fused-224" if case == "sharded" else case
    expected = load_file(recordings(whole) / "expected.safetensors")["pixel_values"]
    paths = sorted(str(path) for path in (recordings(case) / "images").iterdir())
    assert torch.equal(strided(processor(paths)["pixel_values"], expected), expected)


def test_published_config_becomes_ours(recordings, tmp_path):
    published = recordings("image-processor") / "letterbox-fused"
    processor = AutoImageProcessor.from_pretrained(published)
    fields = processor.to_dict()
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "auto_map": {"AutoImageProcessor": "image_processing_openvla.OpenVLAImageProcessor"},
        "image_mean": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
        "image_processor_type": "OpenVLAImageProcessor",
        "image_resize_strategy": "letterbox",
        "image_std": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
        "letterbox_fill": [127, 127, 127],
        "resample": 3,
        "size": {"height": 224, "width": 224},
    }
    assert (tmp_path / "image_processing_openvla.py").is_file()
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == fields


def test_towers_of_different_sizes_are_refused(recordings):
    config = json.loads((recordings("fused-224") / "checkpoint" / "preprocessor_config.json").read_text())
    config["tvf_resize_params"][1]["size"] = [384, 384]
    with pytest.raises(ValueError, match="differently resized"):
        OpenVLAImageProcessor.from_dict(config)


def test_a_published_config_without_its_transforms_is_refused():
    with pytest.raises(ValueError, match="config lacks"):
        OpenVLAImageProcessor.from_dict({"image_processor_type": "PrismaticImageProcessor", "means": []})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_is_resized_once_for_both_towers(strategy, images, monkeypatch):
    processor, calls, resize = OpenVLAImageProcessor(strategy), [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kwargs: calls.append(1) or resize(*args, **kwargs))
    assert processor(images[1])["pixel_values"].shape == (1, 6, 224, 224)
    assert len(calls) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("center_crop_area", [None, 0.9])
def test_round_trip_is_equal_pixel_for_pixel(strategy, center_crop_area, images, tmp_path):
    processor = OpenVLAImageProcessor(
        strategy, 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], Image.Resampling.LANCZOS, (1, 2, 3), center_crop_area
    )
    processor.save_pretrained(tmp_path)
    again = OpenVLAImageProcessor.from_pretrained(tmp_path)
    pixels = processor(images)["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)
    assert torch.equal(again(images)["pixel_values"], pixels)


def test_all_forms_of_an_image_are_equal(processor, images, tmp_path):
    image, array = images[1], np.asarray(images[1])
    image.save(tmp_path / "image.png")
    forms = [
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        array.astype(np.float32),
        (array / 255).astype(np.float32),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array / 255).permute(2, 0, 1).requires_grad_(),
        np.concatenate([array, array[..., :1]], -1),
        array[None],
        [array],
        ([image],),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
    ]
    expected = processor(image)["pixel_values"]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values"], expected)
    gray = image.convert("L")
    gray_pixels = processor(gray)["pixel_values"]
    for form in (np.asarray(gray), np.asarray(gray)[..., None], np.asarray(gray)[None]):
        assert torch.equal(processor(form)["pixel_values"], gray_pixels)
    # A dark image of bytes is dark: only floats may mean [0, 1].
    dark = np.ones((8, 8, 3), np.uint8)
    assert torch.equal(processor(dark)["pixel_values"], processor(Image.fromarray(dark))["pixel_values"])
    black = processor(np.zeros_like(dark))["pixel_values"]
    for dtype in (np.int64, np.float32):
        assert torch.equal(processor(np.zeros((8, 8, 3), dtype))["pixel_values"], black)


def test_a_batch_equals_its_images(processor, images):
    batch = processor(images)["pixel_values"]
    assert batch.shape == (3, 6, 224, 224)
    assert batch.dtype == torch.float32
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(processor(image)["pixel_values"][0], pixels)
    assert isinstance(processor(images, return_tensors=None)["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (None, TypeError, "cannot be a NoneType; pass a PIL image"),
        (3, TypeError, "cannot be a int"),
        ([[1, 2], [3, 4]], TypeError, "cannot be a int"),
        (b"bytes", TypeError, "cannot be a bytes"),
        ("pick up the red block", ValueError, "'pick up the red block' is not a file"),
        ([], ValueError, "list of images is empty"),
        ([np.zeros((4, 4, 3), np.uint8), []], ValueError, "list of images is empty"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, "shape"),
        (np.zeros((2, 5, 5)), ValueError, r"shape \(2, 5, 5\) is not an image"),
        (np.zeros((0, 5, 3)), ValueError, "is not an image"),
        (np.zeros(5), ValueError, "is not an image"),
        (np.full((4, 4, 3), -1.0), ValueError, "leave the normalisation"),
        (np.full((4, 4, 3), np.nan), ValueError, "nan"),
    ],
)
def test_inputs_that_are_not_images_are_refused_with_advice(processor, bad, error, message):
    with pytest.raises(error, match=message):
        processor(bad)


def test_a_float_image_slightly_above_one_is_not_black(processor):
    rng = np.random.default_rng(0)
    edges = np.kron(rng.integers(0, 2, (4, 4)), np.ones((16, 16)))
    channel = Image.fromarray(edges.astype(np.float32)).resize((80, 80), Image.Resampling.BICUBIC)
    image = np.stack([np.asarray(channel)] * 3, -1)
    assert image.max() > 1.05
    assert image.min() < -0.05
    expected = processor(image.clip(0, 1))["pixel_values"]
    for form in (image, torch.from_numpy(image).permute(2, 0, 1), image[None]):
        assert torch.equal(processor(form)["pixel_values"], expected)
    bright = np.full((8, 8, 3), 1.001)
    assert processor(bright)["pixel_values"].min() > 0.99


def test_one_scale_holds_for_all_images_of_an_array(processor):
    night = np.zeros((2, 8, 8, 3), np.uint8)
    night[0, :, :4], night[1, :4] = 200, 1
    expected = processor(night)["pixel_values"]
    assert torch.equal(processor(night.astype(np.float32))["pixel_values"], expected)
    assert torch.equal(processor(night.astype(np.int32).transpose(0, 3, 1, 2))["pixel_values"], expected)


def ramp(low, high, dtype=np.float32):
    return np.linspace(low, high, 8 * 8 * 3).reshape(8, 8, 3).astype(dtype)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (ramp(0, 1.2), ValueError, r"could be in \[0, 1\] or in \[0, 255\]: convert them to"),
        (ramp(0, 9), ValueError, "could be in"),
        (torch.from_numpy(ramp(0, 1.5)).half(), ValueError, "could be in"),
        (ramp(-0.2, 1), ValueError, "leave the normalisation to the processor"),
        (ramp(-1, 255), ValueError, "leave the normalisation to the processor"),
        (ramp(0, 256, np.uint16), ValueError, "leave the normalisation to the processor"),
        (np.full((8, 8, 3), np.inf), ValueError, "leave the normalisation to the processor"),
        (ramp(0, 1.4, np.int64), ValueError, "dtype int64 from 0 to 1 could be in"),
        (torch.ones(3, 8, 8, dtype=torch.int32), ValueError, "dtype int32 from 1 to 1 could be in"),
        (ramp(0, 2, bool), TypeError, "cannot be an array of dtype bool"),
        (torch.ones(3, 8, 8, dtype=torch.bool), TypeError, "cannot be an array of dtype bool"),
        (ramp(0, 1, np.complex64), TypeError, "cannot be an array of dtype complex64"),
        (np.full((8, 8, 3), "red"), TypeError, "cannot be an array of dtype <U3"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "is not an image"),
    ],
)
def test_pixels_of_uncertain_scale_are_refused(processor, image, error, message):
    with pytest.raises(error, match=message):
        processor(image)


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "La"])
def test_pil_modes_without_a_fixed_white_are_refused(processor, mode):
    with pytest.raises(ValueError, match=f"The image has mode '{mode}', which has no fixed white level: scale it"):
        processor(Image.new(mode, (8, 8)))


def test_a_file_of_sixteen_bits_is_refused(processor, tmp_path):
    Image.fromarray(ramp(0, 60000, np.uint16)[..., 0]).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match=r"depth\.png' has mode 'I;16'"):
        processor(tmp_path / "depth.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_pil_modes_are_those_of_the_original(processor, images, mode):
    image = images[1].convert("L").convert("RGB").convert("L" if mode == "LA" else "RGB").convert(mode)
    expected = processor(np.asarray(image.convert("RGB")))["pixel_values"]
    assert torch.equal(processor(image)["pixel_values"], expected)


def test_an_empty_pil_image_is_refused(processor):
    with pytest.raises(ValueError, match=r"The image is empty \(0 x 5 pixels\)\."):
        processor(Image.new("RGB", (0, 5)))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_bomb_is_refused(strategy, images, tmp_path, monkeypatch):
    processor = OpenVLAImageProcessor(strategy, size=32)
    images[0].save(tmp_path / "image.png")  # 224 x 224
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 224 * 224)
    assert processor(tmp_path / "image.png")["pixel_values"].shape == (1, 6, 32, 32)
    forms = (images[0], str(tmp_path / "image.png"), tmp_path / "image.png")
    for limit in (40000, 20000):  # PIL warns above the limit, and raises above twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for form in forms:
            with pytest.raises(ValueError, match=rf"too large: resize or crop it to at most {limit} pixels"):
                processor(form)


@pytest.mark.parametrize("strategy", ["letterbox", "resize-crop"])
def test_an_image_that_a_resize_makes_huge_is_refused(strategy):
    with pytest.raises(ValueError, match="pixels is too large"):
        OpenVLAImageProcessor(strategy)(np.zeros((1, 60_000, 3), np.uint8))


@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_a_damaged_image_is_reported_as_damaged(processor, images, tmp_path, name):
    images[0].save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=rf"{name}' is damaged, truncated or closed \(.*\): read or download it again"):
        processor(str(tmp_path / name))
    with Image.open(tmp_path / name) as image, pytest.raises(OSError, match="The image is damaged"):
        processor(image)
    (tmp_path / name).write_text("No image at all.")
    with pytest.raises(ValueError, match="is a file, but not an image that PIL can read"):
        processor(tmp_path / name)


def test_a_closed_image_is_refused(processor, images, tmp_path):
    images[0].save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        pass
    with pytest.raises(OSError, match="The image is damaged, truncated or closed"):
        processor(image)


class Web:
    """Answer HTTP requests according to their path: with `pages`, with a redirect, endlessly, slowly, or never."""

    def __init__(self):
        self.pages: dict[str, bytes] = {}
        web, self.stopped = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                match self.path:
                    case "/never":
                        web.stopped.wait()
                        return
                    case "/moved":
                        self.send_response(302)
                        self.send_header("Location", "/image.jpg")
                        self.end_headers()
                        return
                    case "/endless" | "/slow":
                        self.send_response(200)
                        self.end_headers()
                        self.drip(*((2**16, 0) if self.path == "/endless" else (1, 0.02)))
                        return
                page = web.pages.get(self.path)
                self.send_response(404 if page is None else 200)
                self.end_headers()
                self.wfile.write(page or b"")

            def drip(self, size, pause):
                try:
                    while not web.stopped.wait(pause):
                        self.wfile.write(bytes(size))
                except OSError:
                    pass  # the client has closed the connection

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Web()
    yield server
    server.stop()


def test_the_exif_orientation_is_not_applied_to_any_form_of_a_photo(processor, images, web, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    path = tmp_path / "photo.jpg"
    images[1].save(path, exif=exif)
    web.pages["/image.jpg"] = data = path.read_bytes()
    stored = np.asarray(Image.open(path))
    assert stored.shape[:2] == images[1].size[::-1]
    text = base64.b64encode(data).decode()
    forms = [
        Image.open(path), path, str(path), f"{web.url}/image.jpg", f"{web.url}/moved",
        text, f"data:image/jpeg;base64,{text}",
    ]  # fmt: skip
    expected = processor(stored)["pixel_values"]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values"], expected)


@pytest.mark.parametrize("page", ["/never", "/slow"])
def test_a_url_that_does_not_answer_in_time_is_an_error(processor, web, monkeypatch, page):
    monkeypatch.setattr(image_processing_openvla, "URL_TIMEOUT", 0.2)
    with pytest.raises(OSError, match=r"could not be downloaded: no answer within 0\.2 seconds\. Check the address"):
        processor(web.url + page)


def test_a_host_that_accepts_and_sends_nothing_is_an_error(processor, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(image_processing_openvla, "URL_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent_host, pytest.raises(OSError, match="no answer within"):
        processor(f"http://127.0.0.1:{silent_host.getsockname()[1]}/image.jpg")


def test_a_download_has_a_largest_size(processor, web, images, monkeypatch):
    monkeypatch.setattr(image_processing_openvla, "URL_TIMEOUT", 600)  # 64 MiB take a while on a busy machine
    with pytest.raises(OSError, match="could not be downloaded: it has more than 67108864 bytes"):
        processor(f"{web.url}/endless")
    data = io.BytesIO()
    images[0].save(data, "PNG")
    web.pages["/image.png"] = data.getvalue()
    monkeypatch.setattr(image_processing_openvla, "MAX_DOWNLOAD", len(data.getvalue()))
    assert processor(f"{web.url}/image.png")["pixel_values"].shape == (1, 6, 224, 224)


def test_a_url_without_an_image_is_an_error(processor, web):
    web.pages["/page"] = b"<html>"
    with pytest.raises(ValueError, match=r"/page' does not answer with an image"):
        processor(f"{web.url}/page")
    with pytest.raises(OSError, match=r"/none' could not be downloaded: HTTP Error 404: Not Found\. Check"):
        processor(f"{web.url}/none")
    with pytest.raises(OSError, match=r"could not be downloaded: .*refused"):
        processor("http://127.0.0.1:9/image.jpg")  # nobody listens there
    for malformed in ("http://", "http://[::1", "https://a b", "http://127.0.0.1:port/", "http://\x00"):
        with pytest.raises(OSError, match="could not be downloaded"):
            processor(malformed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_resize_strategy": "stretch"}, "Unknown `image_resize_strategy` 'stretch'"),
        ({"size": {"shortest_edge": 224}}, "height and a width"),
        ({"center_crop_area": 0.0}, r"fraction in \(0, 1\]"),
        ({"resample": "lanczos"}, "resample='lanczos' is not a filter: pass one of PIL's filters or 'lanczos3'"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "for 1 towers, but `image_std` for 2"),
        ({"image_resize_strategy": "letterbox", "size": (224, 320)}, "square"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAImageProcessor(**fields)


def test_centre_crop_keeps_the_fraction_of_the_area(images):
    # On a ramp, pixel i samples the old position 111.5 (1 - s) + s i, where s is the share of the side that is kept.
    # Like TensorFlow, the crop scales the result by 255.5 / 255 and truncates it.
    ramp = Image.fromarray(np.repeat(np.tile(np.arange(224, dtype=np.uint8), (224, 1))[..., None], 3, -1))
    processor = OpenVLAImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3, center_crop_area=0.81)
    levels = processor(ramp)["pixel_values"][0, 0] * 255
    expected = 111.5 * (1 - 0.9) + 0.9 * torch.arange(224.0)
    assert (levels - (expected * 255.5 / 255).floor()).abs().max() < 1e-3
    whole = OpenVLAImageProcessor(center_crop_area=1.0)(images[0])["pixel_values"]
    assert torch.equal(whole, OpenVLAImageProcessor()(images[0])["pixel_values"])


@pytest.mark.parametrize("index", [3, 4])
def test_resize_and_centre_crop_of_the_evaluation_are_the_originals(recordings, index):
    folder = recordings("oft-image") / "images"
    # PNG in the full recordings, and WebP without loss here.
    camera, *results = (
        Image.open(next(folder.glob(f"{index}.{name}.*"))) for name in ("jpeg", "resized", "resized_cropped")
    )
    resized, cropped = map(np.asarray, results)

    def rows(image):
        """Return the rows that were kept of a result: every fourth, or all in the full recordings."""
        return np.asarray(image)[:: image.height // len(resized)]

    by_lanczos3 = OpenVLAImageProcessor(resample="lanczos3").resize(camera)
    np.testing.assert_array_equal(rows(by_lanczos3), resized)
    both = OpenVLAImageProcessor(resample="lanczos3", center_crop_area=0.9)
    np.testing.assert_array_equal(rows(both.resize(camera)), cropped)
    crop = OpenVLAImageProcessor(center_crop_area=0.9)
    np.testing.assert_array_equal(rows(crop.resize(by_lanczos3)), cropped)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (2000, 3)])
def test_any_size_is_resized_by_lanczos3(size):
    image = Image.new("RGB", size, (10, 200, 30))
    resized = OpenVLAImageProcessor(resample="lanczos3", size=32, center_crop_area=0.5).resize(image)
    assert resized.size == (32, 32)
    assert {color for _, color in resized.getcolors()} == {(10, 200, 30)}


def test_the_filter_and_the_centre_crop_are_set_at_load(tmp_path):
    OpenVLAImageProcessor().save_pretrained(tmp_path)
    loaded = OpenVLAImageProcessor.from_pretrained(tmp_path, center_crop_area=0.9, resample="lanczos3")
    assert (loaded.center_crop_area, loaded.resample) == (0.9, "lanczos3")
    loaded.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert (again.center_crop_area, again.resample) == (0.9, "lanczos3")
