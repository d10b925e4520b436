"""What goes wrong around a server: damaged images and bodies, clients that leave, a full queue, a signal."""

import asyncio
import contextlib
import os
import random
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import json_numpy
import numpy as np
import pytest
from http_bodies import as_file, as_json, in_base64
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from openvla_hf.serving.errors import ShuttingDown
from openvla_hf.serving.policy import ServedPolicy
from openvla_hf.serving.service import Service


MUTATIONS = int(os.environ.get("OPENVLA_FUZZ_EXAMPLES", "60"))
REFUSED = {400, 413, 422}


class Gated(ServedPolicy):
    """A policy whose predictions wait until the test opens the gate, and fail with the errors of the test."""

    def __init__(self, policy):
        super().__init__(policy.model, policy.processor, policy.model_id, unnorm_key=policy.default_key)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.errors, self.sizes = [], []

    def predict(self, prepared):
        self.sizes.append(len(prepared))
        self.entered.release()
        self.gate.wait(20)
        if self.errors:
            raise self.errors.pop()
        return super().predict(prepared)


@pytest.fixture
def gated(plain_policy):
    return Gated(plain_policy)


@pytest.fixture
def body(plain_policy, make_observation):
    return as_json(make_observation(plain_policy))


@contextlib.contextmanager
def busy(policy, client, body):
    """A policy that works on a request until the end of the block, and a pool for more requests."""
    with ThreadPoolExecutor(8) as pool:
        while policy.entered.acquire(blocking=False):
            pass
        policy.gate.clear()
        try:
            first = pool.submit(client.post, "/v1/act", json=body)
            assert policy.entered.acquire(timeout=20)
            yield pool
        finally:
            policy.gate.set()
        assert first.result().status_code == 200


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("It did not happen.")


def queue_length(client):
    return int(float(client.get("/metrics").text.split("\nopenvla_queue_length ")[1].split("\n")[0]))


# Images


@pytest.fixture(scope="module")
def plain(plain_policy, serve):
    with serve(plain_policy, max_pixels=100_000) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def rotated(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_file(image, "JPEG", exif=exif)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(width, height, depth=8, size=1_000_000):
    """An RGB file, which may have fewer bytes of pixels than it claims."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * size, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


GREY = np.full((20, 30, 3), 127, np.uint8)
SEE_THROUGH = np.full((20, 30, 4), 127, np.uint8)


@pytest.mark.parametrize(
    ("file", "status", "reason"),
    [
        (b"", 422, "not a readable JPEG or PNG"),
        (b"GIF89a", 422, "not a readable JPEG or PNG"),
        (as_file(GREY, "GIF"), 422, "not a readable JPEG or PNG"),
        (as_file(GREY, "JPEG")[:300], 422, "not a readable JPEG or PNG"),
        (as_file(GREY)[:60], 422, "not a readable JPEG or PNG"),
        (rotated(Image.fromarray(GREY)), 422, "EXIF orientation 6: rotate its pixels"),
        (as_file(SEE_THROUGH), 422, "mode 'RGBA'"),
        (as_file(Image.fromarray(GREY), transparency=(127, 127, 127)), 422, "mode 'RGBA'"),
        (as_file(np.full((20, 30), 30_000, np.uint16)), 422, "16 bits per channel"),
        (black_png(20, 30, depth=16, size=30 * 121), 422, "16 bits per channel"),
        (as_file(Image.fromarray(GREY).convert("CMYK"), "JPEG"), 422, "mode 'CMYK'"),
        (as_file(np.zeros((400, 300, 3), np.uint8)), 413, "300 x 400 pixels"),
        (black_png(9_000, 9_000), 413, "9000 x 9000 pixels"),
        (black_png(65_000, 65_000), 413, "more than the 100000 pixels"),
        (as_file(GREY, "JPEG") + b"\xff\xda" * 65, 422, "more than 64 scans"),
    ],
)
def test_an_image_that_is_damaged_or_not_as_agreed_is_refused(plain, file, status, reason):
    body = {"images": {"image": in_base64(file)}, "instruction": "go"}
    in_json = plain.post("/v1/act", json=body)
    in_form = plain.post("/v1/act", data={"instruction": "go"}, files={"image": file})
    for response in (in_json, in_form):
        assert response.status_code == status, response.text
        assert reason in response.json()["reason"]


def test_grey_and_opaque_images_are_taken_as_they_look(plain):
    def act(file):
        response = plain.post("/v1/act", data={"instruction": "go"}, files={"image": file})
        assert response.status_code == 200, response.text
        return response.json()["actions"]

    opaque = np.dstack([GREY, np.full((20, 30), 255, np.uint8)])
    grey = as_file(GREY[..., 0])
    palette = as_file(Image.fromarray(GREY).convert("P", palette=Image.Palette.ADAPTIVE))
    unused = as_file(Image.fromarray(GREY), transparency=(1, 2, 3))
    noise = PngInfo()
    noise.add(b"noIs", b"\xff\xda" * 65)  # the bytes with which scans of a JPEG start
    noisy = as_file(GREY, pnginfo=noise)
    assert act(as_file(GREY)) == act(as_file(opaque)) == act(grey) == act(palette) == act(unused) == act(noisy)


# Bodies


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"instruction": ""}, 422, "`instruction`: String should have at least 1 character"),
        ({"instruction": "go " * 400}, 422, "1200 characters"),
        ({"instruction": 3}, 422, "`instruction`: Input should be a valid string"),
        ({"images": {}}, 422, "`images`: Dictionary should have at least 1 item"),
        ({"images": {"image": "?"}}, 422, "not valid base64"),
        ({"images": {"front": ""}}, 422, "no camera 'front': its cameras are 'image'"),
        ({"state": [0.1]}, 422, "takes none"),
        ({"state": ["a"]}, 422, "`state.0`: Input should be a valid number"),
        ({"unnorm_key": "tine"}, 422, "Did you mean 'tiny'?"),
        ({"session": "nobody"}, 410, "expired or was never opened"),
        ({"details": "some"}, 422, "`details`: Input should be 'none', 'chosen' or 'all'"),
        ({"speed": 1}, 422, "`speed`: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_field_is_named(plain, body, change, status, reason):
    response = plain.post("/v1/act", json=body | change)
    assert response.status_code == status, response.text
    assert reason in response.json()["reason"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_state_that_is_not_finite_is_refused(plain, number):
    content = f'{{"images": {{"image": ""}}, "instruction": "go", "state": [{number}]}}'
    response = plain.post("/v1/act", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]) == (422, "unprocessable")
    form = plain.post("/v1/act", data={"instruction": "go", "state": f"[{number}]"}, files={"image": b""})
    assert (form.status_code, form.json()["error"]) == (422, "unprocessable")


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("application/json", b"", 400),
        ("application/json", b'"\xff"', 400),
        ("application/json", b"[" * 5_000, 400),
        ("application/json", b'{"state": [' + b"0," * 10_000 + b"0]}", 400),
        ("text/plain", b"{}", 415),
        ("multipart/form-data", b"--x", 400),
        ("multipart/form-data; boundary=x", b"--x", 422),
        ("multipart/form-data; boundary=x", b"y--x--", 400),
        (
            "multipart/form-data; boundary=x; charset=punycode",
            b'--x\r\nContent-Disposition: form-data; name="a..b"\r\n\r\nb\r\n--x--',
            400,
        ),
    ],
)
def test_a_body_that_cant_be_read_is_refused(plain, kind, content, status):
    response = plain.post("/v1/act", content=content, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert re.search(r"[^.]\.$", response.json()["reason"])


def mutate(data, rng):
    """Change, insert, remove or repeat some bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice([1, 1, 4, 50]))
        match rng.randrange(5):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start:start] = rng.choice([b"{", b"]", b'"', b"\0", b"\xff", b"null", b"1e999", rng.randbytes(4)])
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = data[start:end]
            case 4:
                del data[rng.randrange(len(data)) :]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("door", ["json", "form", "original", "png", "jpeg"])
def test_mutated_requests_get_an_answer_or_a_reason(plain, body, door):
    rng = random.Random(0)
    client = plain
    form = client.build_request("POST", "/v1/act", data={"instruction": "go"}, files={"image": as_file(GREY)})
    files = {"png": as_file(GREY), "jpeg": as_file(GREY, "JPEG")}
    for _ in range(MUTATIONS):
        if door == "json":
            content = mutate(client.build_request("POST", "/v1/act", json=body).read(), rng)
            response = client.post("/v1/act", content=content, headers={"Content-Type": "application/json"})
        elif door == "form":
            content = mutate(form.read(), rng)
            response = client.post("/v1/act", content=content, headers={"Content-Type": form.headers["content-type"]})
        elif door == "original":
            content = mutate(json_numpy.dumps({"image": GREY, "instruction": "go", "state": [1.0]}).encode(), rng)
            response = client.post("/act", content=content)
        else:
            files_sent = {"image": mutate(files[door], rng)}
            response = client.post("/v1/act", data={"instruction": "go"}, files=files_sent)
        assert response.status_code in {200, *REFUSED}, (response.status_code, response.text)
        if response.status_code != 200:
            assert response.json()["reason"]
    assert client.post("/v1/act", json=body).status_code == 200


# Clients and load


def test_a_client_that_leaves_frees_its_place_in_the_queue(gated, serve, body):
    with serve(gated, max_queue=1) as url, httpx.Client(base_url=url, timeout=30) as client:
        with busy(gated, client, body) as pool:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/act", json=body, timeout=httpx.Timeout(20, read=0.3))
            wait_for(lambda: queue_length(client) == 0)
            waiting = pool.submit(client.post, "/v1/act", json=body)
            wait_for(lambda: queue_length(client) == 1)
        assert waiting.result().status_code == 200
        assert gated.sizes == [1, 1, 1]  # the first is the server's own


def test_a_client_that_leaves_in_the_middle_of_a_body_does_no_harm(plain, body, caplog):
    host, port = plain.base_url.host, plain.base_url.port
    start = b"POST /act HTTP/1.1\r\nHost: localhost\r\n"
    for sent in (start, start + b"Content-Length: 9\r\n\r\n{"):
        with socket.create_connection((host, port)) as client:
            client.sendall(sent)
    assert plain.post("/v1/act", json=body).status_code == 200
    assert not caplog.records


def test_a_full_queue_answers_when_to_come_back(gated, serve, body):
    with serve(gated, max_queue=1) as url, httpx.Client(base_url=url, timeout=30) as client:
        with busy(gated, client, body) as pool:
            waiting = pool.submit(client.post, "/v1/act", json=body)
            wait_for(lambda: queue_length(client) == 1)
            refused = client.post("/v1/act", json=body)
            assert (refused.status_code, refused.json()["error"]) == (503, "busy")
            assert int(refused.headers["retry-after"]) >= 1
        assert waiting.result().status_code == 200


def test_a_stale_request_of_a_session_is_dropped_for_its_newest(gated, serve, body):
    with serve(gated) as url, httpx.Client(base_url=url, timeout=30) as client:
        body["session"] = client.post("/v1/sessions").json()["session"]
        with busy(gated, client, body) as pool:
            stale = pool.submit(client.post, "/v1/act", json=body)
            wait_for(lambda: queue_length(client) == 1)
            newest = pool.submit(client.post, "/v1/act", json=body)
            assert (stale.result().status_code, stale.result().json()["error"]) == (409, "superseded")
        assert newest.result().status_code == 200


def test_out_of_memory_is_an_answer_and_the_next_request_is_served(gated, serve, body):
    import torch

    with serve(gated) as url, httpx.Client(base_url=url, timeout=30) as client:
        gated.errors.append(torch.OutOfMemoryError("CUDA out of memory"))
        failed = client.post("/v1/act", json=body)
        assert (failed.status_code, failed.json()["error"]) == (503, "busy")
        assert "Out of memory" in failed.json()["reason"]
        assert client.post("/v1/act", json=body).status_code == 200


def test_a_service_that_stops_waits_for_no_part_of_a_request(plain_policy):
    async def stop_while_a_part_arrives():
        service, loop = Service(plain_policy), asyncio.get_running_loop()
        await service.start()
        before = asyncio.ensure_future(service.receive(loop.create_future(), loop.time() + 60))
        await asyncio.sleep(0)
        await service.stop()
        for part in (before, service.receive(loop.create_future(), loop.time() + 60)):
            with pytest.raises(ShuttingDown):
                await part

    asyncio.run(asyncio.wait_for(stop_while_a_part_arrives(), 20))


def test_an_unused_session_expires(gated, serve, body):
    with serve(gated, session_seconds=0.05, max_sessions=1) as url, httpx.Client(base_url=url, timeout=30) as client:
        session = client.post("/v1/sessions").json()["session"]
        time.sleep(0.1)
        gone = client.post("/v1/act", json=body | {"session": session})
        assert (gone.status_code, gone.json()["error"]) == (410, "session_expired")
        assert client.post("/v1/sessions").status_code == 201


def test_there_are_at_most_as_many_sessions_as_allowed(gated, serve):
    with serve(gated, max_sessions=1) as url, httpx.Client(base_url=url, timeout=30) as client:
        session = client.post("/v1/sessions").json()["session"]
        refused = client.post("/v1/sessions")
        assert (refused.status_code, refused.json()["error"]) == (429, "too_many_requests")
        client.delete(f"/v1/sessions/{session}")
        assert client.post("/v1/sessions").status_code == 201
