"""The original servers' `POST /act`, asked as their clients ask."""

import contextlib
import json

import httpx
import json_numpy
import numpy as np
import pytest
import requests
from starlette.responses import JSONResponse


INSTRUCTION = "pick up the red block"


@contextlib.contextmanager
def patched_json():
    """The JSON of processes that called `json_numpy.patch()`, as the original's servers and clients do."""
    plain = {name: getattr(json, name) for name in ("dump", "dumps", "load", "loads")}
    json_numpy.patch()
    try:
        yield
    finally:
        vars(json).update(plain)


def post(url, body):
    """Post as the original's clients do."""
    with patched_json():
        request = requests.Request("POST", f"{url}/act", json=body).prepare()
    return requests.Session().send(request, timeout=30)


def read(response):
    with patched_json():
        return response.json()


def original_reply(action, is_encoded):
    """The bytes that the original's servers reply."""
    with patched_json():
        return JSONResponse(json_numpy.dumps(action) if is_encoded else action).body


@pytest.fixture(scope="module")
def plain(plain_policy, serve):
    with serve(plain_policy) as url:
        yield url


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def expected(policy, image, key="tiny"):
    inputs = policy.processor(image, instruction=INSTRUCTION)
    return policy.model.predict_action(**inputs, unnorm_key=key)


@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("key", [None, "half"])
def test_openvlas_clients_get_the_bytes_of_the_original(plain, plain_policy, image, key, is_encoded):
    body = {"image": image, "instruction": INSTRUCTION} | ({"unnorm_key": key} if key else {})
    response = post(plain, {"encoded": json_numpy.dumps(body)} if is_encoded else body)
    assert response.status_code == 200, response.text
    action = expected(plain_policy, image, key or "tiny")
    assert (action.dtype, action.shape) == (np.float64, (7,))
    assert response.content == original_reply(action, is_encoded)
    assert response.headers["content-type"] == "application/json"
    np.testing.assert_array_equal(json_numpy.loads(read(response)) if is_encoded else read(response), action)


@pytest.mark.parametrize("is_encoded", [False, True])
def test_ofts_clients_get_the_bytes_of_the_original(chunk_policy, serve, image, is_encoded):
    state = np.linspace(-1, 1, 8)
    body = {"full_image": image, "wrist_image": image[::-1], "state": state, "instruction": INSTRUCTION}
    with serve(chunk_policy) as url:
        response = post(url, {"encoded": json_numpy.dumps(body)} if is_encoded else body)
    images = {"full_image": image, "wrist_image": image[::-1]}
    inputs = chunk_policy.processor(images, instruction=INSTRUCTION, state=state)
    chunk = chunk_policy.model.predict_action(**inputs)
    assert response.status_code == 200, response.text
    assert response.content == original_reply([chunk[i] for i in range(len(chunk))], is_encoded)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[1]", 422, "must be a map"),
        (b'{"encoded": "{"}', 400, "not valid JSON"),
        (b'{"encoded": "{}", "image": 1}', 400, "must have no other key"),
        (b'{"instruction": "go"}', 422, "no image of the camera 'image'"),
        (b'{"image": "frame.png", "instruction": "go"}', 422, "must be an array"),
        (b'{"image": {"__numpy__": "gASVCg==", "dtype": "|O", "shape": [1]}}', 400, "dtype '|O'"),
    ],
)
def test_a_wrong_body_gets_its_reason_or_the_originals_error(plain, body, status, reason):
    response = httpx.post(f"{plain}/act", content=body)
    assert response.status_code == status
    assert reason in response.json()["reason"]


def test_a_body_that_is_not_read_to_its_end_closes_the_connection(plain_policy, serve):
    with serve(plain_policy, original_errors=True, max_body_bytes=1000) as url:
        response = httpx.post(f"{url}/act", content=iter([b"{", b" " * 1000, b"}"]))
    assert (response.status_code, response.json()["error"]) == (413, "too_large")
    assert response.headers["connection"] == "close"


def test_every_error_is_the_originals_on_request(plain_policy, serve, image):
    with serve(plain_policy, original_errors=True) as url:
        for body in (b"{", b"[]", b'{"instruction": "go"}', b'{"encoded": 1}'):
            response = httpx.post(f"{url}/act", content=body)
            assert (response.status_code, response.content) == (200, b'"error"')
        wrong_key = {"image": image, "instruction": INSTRUCTION, "unnorm_key": "nobody"}
        assert post(url, wrong_key).content == b'"error"'
        np.testing.assert_array_equal(
            read(post(url, wrong_key | {"unnorm_key": "tiny"})), expected(plain_policy, image)
        )
