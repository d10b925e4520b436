import socket
import time

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from openvla_hf.serving import connection
from openvla_hf.serving.arrays import pack, unpack
from openvla_hf.serving.security import check_exposure, is_loopback
from openvla_hf.serving.service import ServiceOptions


TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def closed(plain_policy, serve):
    """A server with a token."""
    with serve(plain_policy, token=TOKEN) as url:
        yield url


@pytest.fixture(scope="module")
def small(plain_policy, serve):
    """A server without a token and with narrow limits."""
    with serve(plain_policy, max_body_bytes=2000, request_seconds=0.3, allowed_hosts=["Robot.Lab"]) as url:
        yield url


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"Api-Key {TOKEN}", f"bearer  {TOKEN}"])
def test_the_token_opens_the_server(closed, header):
    assert httpx.get(f"{closed}/info", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff".encode("latin-1")],
)
@pytest.mark.parametrize("path", ["/info", "/v1/act", "/act", "/metrics", "/openapi.json", "/nothing"])
def test_without_the_token_only_the_health_is_told(closed, header, path):
    headers = {} if header is None else {"Authorization": header}
    response = httpx.request("POST" if "act" in path else "GET", closed + path, headers=headers)
    assert (response.status_code, response.json()["error"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text
    assert httpx.get(f"{closed}/health", headers=headers).status_code == 200


def test_the_document_asks_for_the_token(closed):
    document = httpx.get(f"{closed}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert document["security"] == [{"token": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_a_websocket_needs_the_token_too(closed):
    with pytest.raises(InvalidStatus) as refused:
        connect(closed.replace("http", "ws"))
    assert refused.value.response.status_code == 401
    assert TOKEN not in repr(ServiceOptions(token=TOKEN))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:1234"}, 200),
        ({"Host": "192.168.0.7"}, 200),
        ({"Host": "robot.lab:80"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[bad"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://robot.lab"}, 200),
    ],
)
def test_pages_of_other_websites_are_refused(small, headers, status):
    response = httpx.get(f"{small}/info", headers=headers)
    assert response.status_code == status, response.text
    if status == 403:
        assert response.json()["error"] == "forbidden"


def test_the_servers_own_pages_are_allowed(small):
    assert httpx.post(f"{small}/v1/sessions", headers={"Origin": small}).status_code == 201


def test_a_websocket_from_another_website_is_refused(small):
    with pytest.raises(InvalidStatus) as refused:
        connect(small.replace("http", "ws"), origin="https://evil.example")
    assert refused.value.response.status_code == 403


def test_a_body_over_the_limit_is_refused_before_and_while_it_arrives(small):
    announced = httpx.post(f"{small}/v1/act", content=b"x" * 3000, headers={"Content-Type": "application/json"})
    chunked = httpx.post(
        f"{small}/v1/act", content=(b"x" * 500 for _ in range(6)), headers={"Content-Type": "application/json"}
    )
    for response in (announced, chunked):
        assert (response.status_code, response.json()["error"]) == (413, "too_large")
        assert "2000 bytes" in response.json()["reason"]


def read_all(client):
    """Read until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(4096), b""))


def test_half_a_body_is_given_up(small):
    host, port = small.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


def test_a_head_that_is_too_slow_or_too_long_is_given_up(small, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    address = small.removeprefix("http://").split(":")
    with socket.create_connection(address, timeout=20) as silent, socket.create_connection(address, 20) as slow:
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        slow.sendall(request + b"\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += slow.recv(4096)
        slow.sendall(request)  # the head of the second request never ends
        assert read_all(slow) == b""
        assert read_all(silent) == b""
    with socket.create_connection(address, timeout=20) as long:
        long.sendall(request + b"X: " + b"x" * 80_000)
        assert read_all(long).startswith(b"HTTP/1.1 400 ")
    with connect(small.replace("http", "ws")) as client:
        client.recv()
        time.sleep(0.3)
        assert client.ping().wait(20)


def test_endless_trailers_and_the_rest_of_a_refused_body_are_given_up(small, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    address = small.removeprefix("http://").split(":")
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        with pytest.raises(ConnectionError):
            client.sendall(b"X: %s\r\n" % (b"x" * 8_000) * 1000)
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{")
        assert read_all(client).startswith(b"HTTP/1.1 413 ")


def test_requests_that_are_sent_ahead_are_answered_in_order(small, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    address = small.removeprefix("http://").split(":")
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(
            b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"/ready", b"/health"))
        )
        answers = read_all(client)
    assert answers.index(b'{"status":"ready"}') < answers.index(b'{"status":"ok"}')
    assert answers.count(b"HTTP/1.1 200 ") == 2


def test_a_client_may_not_exceed_its_rate(plain_policy, serve):
    with serve(plain_policy, requests_per_second=1) as url, httpx.Client(base_url=url) as client:
        answers = [client.post("/v1/sessions") for _ in range(5)]
        statuses = [one.status_code for one in answers]
        assert statuses[0] == 201
        assert 429 in statuses
        refused = next(one for one in answers if one.status_code == 429)
        assert refused.json()["error"] == "too_many_requests"
        time.sleep(int(refused.headers["retry-after"]))
        assert client.post("/v1/sessions").status_code == 201


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False)]
)
def test_only_loopback_is_open_without_a_token(host, is_local):
    assert is_loopback(host) is is_local
    check_exposure(host, TOKEN)
    check_exposure(host, None, allow_no_token=True)
    if is_local:
        check_exposure(host, None)
    else:
        with pytest.raises(ValueError, match="could command the robot: give a token"):
            check_exposure(host, None)


@pytest.mark.parametrize("token", ["", "two words", "tökén", "line\n"])
def test_a_token_that_a_header_cant_carry_is_refused(token):
    with pytest.raises(ValueError, match="The token must consist of"):
        ServiceOptions(token=token)


def test_tokens_cant_be_tried_faster_than_the_rate(plain_policy, serve):
    with serve(plain_policy, requests_per_second=1, token=TOKEN) as url:
        wrong = {"Authorization": "Bearer wrong"}
        statuses = [httpx.get(f"{url}/info", headers=wrong).status_code for _ in range(5)]
        assert statuses[0] == 401
        assert 429 in statuses


def test_a_websocket_over_the_rate_is_slowed_down(plain_policy, serve, make_observation):
    seen = make_observation(plain_policy)
    with serve(plain_policy, requests_per_second=4) as url, connect(url.replace("http", "ws")) as client:
        client.recv()
        message = pack({"image": seen.images["image"], "prompt": seen.instruction})
        started = time.monotonic()
        for _ in range(6):
            client.send(message)
            assert "actions" in unpack(client.recv())
        assert time.monotonic() - started > 0.5
