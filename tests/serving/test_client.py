import contextlib
import io
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from running import INSTRUCTION

from openvla_hf.serving import Client, ServerError
from openvla_hf.serving.policy import ServedPolicy


@pytest.fixture(scope="module")
def plain_server(serve, plain_policy):
    with serve(plain_policy) as url:
        yield url


@pytest.fixture
def client(plain_server):
    with Client(plain_server) as client:
        yield client


def predict(policy, images, state=None, key=None):
    """What the model itself answers."""
    images = images["image"] if policy.processor.cameras is None else images
    inputs = policy.processor(images, instruction=INSTRUCTION, state=state)
    return policy.model.predict_action(**inputs, unnorm_key=key or policy.default_key)


def frame(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@contextlib.contextmanager
def listening(answer):
    """A server that calls `answer(connection)` for each connection, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as open_connections:

        def accept():
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    connection = open_connections.enter_context(listener.accept()[0])
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def read_message(connection):
    """A request or an answer, as bytes; empty if the connection is closed."""
    with io.BytesIO() as message:
        while chunk := connection.recv(2**20):
            message.write(chunk)
            head, end, body = message.getvalue().partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            if end and len(body) >= (int(length[1]) if length else 0):
                return message.getvalue()
    return b""


@contextlib.contextmanager
def losing_answers(url, path, times):
    """A connection to a server that breaks before the answers to the first requests for a path arrive."""
    host, port = url.removeprefix("http://").split(":")
    lost = []

    def forward(connection):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as server:
            while request := read_message(connection):
                server.sendall(request)
                answer = read_message(server)
                if path.encode() in request.partition(b"\r\n")[0] and len(lost) < times:
                    lost.append(answer)
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                connection.sendall(answer)

    with listening(forward) as through:
        yield through, lost


# Answers


def test_an_answer_equals_predict_action_of_the_model(client, plain_policy):
    for image in (frame(), Image.fromarray(frame()), Image.fromarray(frame()[..., 0])):
        seen = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
        action = client.predict_action(image, INSTRUCTION)
        assert (action.shape, action.dtype) == ((7,), np.float64)
        np.testing.assert_array_equal(action, predict(plain_policy, {"image": seen}))
    half = client.predict_action({"image": frame()}, INSTRUCTION, unnorm_key="half")
    np.testing.assert_array_equal(half, predict(plain_policy, {"image": frame()}, key="half"))


def test_chunks_with_cameras_and_state_equal_predict_action_of_the_model(serve, chunk_policy, make_observation):
    seen = make_observation(chunk_policy)
    with serve(chunk_policy) as url, Client(url) as client:
        chunk = client.predict_action(seen.images, INSTRUCTION, seen.state.tolist())
    assert chunk.shape == (8, 7)
    np.testing.assert_array_equal(chunk, predict(chunk_policy, seen.images, seen.state))


def test_jpeg_is_an_option_and_changes_what_the_policy_sees(plain_server, plain_policy):
    file = io.BytesIO()
    Image.fromarray(frame()).save(file, "JPEG", quality=90)
    with Client(plain_server, jpeg_quality=90) as client:
        action = client.predict_action(frame(), INSTRUCTION)
    np.testing.assert_array_equal(action, predict(plain_policy, {"image": np.asarray(Image.open(file))}))


def test_robots_in_threads_share_a_client_and_get_their_own_actions(client, plain_policy):
    def act(seed):
        with client.session() as session:
            return [session.predict_action(frame(seed + step), INSTRUCTION) for step in range(2)]

    with ThreadPoolExecutor(4) as pool:
        for seed, actions in enumerate(pool.map(act, range(4))):
            expected = [predict(plain_policy, {"image": frame(seed + step)}) for step in range(2)]
            np.testing.assert_allclose(actions, expected, atol=1e-9)
    assert client.round_trip.count == 8


def test_the_round_trip_is_measured(plain_server):
    with Client(plain_server) as client:
        assert client.round_trip.count == 0
        for _ in range(3):
            client.predict_action(frame(), INSTRUCTION)
        measured = client.round_trip
    assert measured.count == 3
    assert 0 < measured.median <= measured.p95 <= measured.longest
    assert measured.last <= measured.longest


def test_reset_starts_an_episode(serve, chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)
    first, second = (make_observation(policy, seed) for seed in range(2))
    with serve(policy) as url, Client(url) as client, client.session() as session:
        session.predict_action(first.images, INSTRUCTION, first.state)
        averaged = session.predict_action(second.images, INSTRUCTION, second.state)
        session.reset()
        fresh = session.predict_action(second.images, INSTRUCTION, second.state)
    alone = predict(policy, second.images, second.state)[0]
    np.testing.assert_array_equal(fresh, alone)
    assert np.abs(averaged - alone).max() > 1e-3


def test_the_client_works_where_httpx_numpy_and_pillow_alone_are_installed(run_fresh_python, plain_server):
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "huggingface_hub", "fastapi", "rich"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
import numpy
from openvla_hf.serving import Client, SafetyLimits
with Client(sys.argv[1]) as client, client.session() as session:
    print(session.predict_action(numpy.zeros((8, 8, 3), numpy.uint8), "go").tolist())
print("torch" in sys.modules)
"""
    action, has_torch = run_fresh_python(code, plain_server).stdout.splitlines()
    assert len(action.split(",")) == 7
    assert has_torch == "False"


# Faults


def test_a_server_that_restarts_is_found_again(serve, plain_policy):
    with contextlib.ExitStack() as running:
        url = running.enter_context(serve(plain_policy))
        with Client(url) as client, client.session() as session:
            before = session.predict_action(frame(), INSTRUCTION)
            running.close()
            restart = threading.Timer(0.2, lambda: running.enter_context(serve(plain_policy, port=port_of(url))))
            restart.start()
            after = session.predict_action(frame(), INSTRUCTION)
            session.reset()
            restart.join()
    np.testing.assert_array_equal(before, after)


def port_of(url):
    return int(url.rpartition(":")[2])


def test_another_policy_after_a_restart_does_not_move_the_robot(serve, plain_policy):
    inverted = ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny", gripper="libero")
    with contextlib.ExitStack() as running:
        url = running.enter_context(serve(plain_policy))
        with Client(url) as client, client.session() as session:
            session.predict_action(frame(), INSTRUCTION)
            running.close()
            with serve(inverted, port=port_of(url)):
                with pytest.raises(ServerError, match="now serves another policy") as raised:
                    session.predict_action(frame(), INSTRUCTION)
                assert raised.value.kind == "policy_changed"


def test_a_session_with_ensembling_is_not_renewed_until_reset(serve, chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)
    seen = make_observation(policy)
    arguments = (seen.images, INSTRUCTION, seen.state)
    with contextlib.ExitStack() as running:
        url = running.enter_context(serve(policy))
        with Client(url) as client, client.session() as session:
            action = session.predict_action(*arguments)
            running.close()
            with serve(policy, port=port_of(url)):
                with pytest.raises(ServerError, match="open a new one") as raised:
                    session.predict_action(*arguments)
                assert (raised.value.status, raised.value.kind) == (410, "session_expired")
                session.reset()
                np.testing.assert_array_equal(session.predict_action(*arguments), action)


def test_a_lost_answer_is_asked_for_again(plain_server, plain_policy):
    with losing_answers(plain_server, "/v1/act", times=2) as (url, lost), Client(url) as client:
        action = client.predict_action(frame(), INSTRUCTION)
    assert len(lost) == 2
    np.testing.assert_array_equal(action, predict(plain_policy, {"image": frame()}))


def test_a_lost_answer_is_not_asked_for_again_where_it_would_count_twice(serve, chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)
    seen = make_observation(policy)
    with (
        serve(policy) as server,
        losing_answers(server, "/v1/act", times=1) as (url, lost),
        Client(url) as client,
        client.session() as session,
    ):
        with pytest.raises(ServerError, match="broke") as raised:
            session.predict_action(seen.images, INSTRUCTION, seen.state)
        assert (raised.value.status, raised.value.kind) == (None, "disconnected")
    assert len(lost) == 1


@pytest.fixture
def gate(plain_policy, monkeypatch):
    """Holds predictions back, from when it is cleared until it is set."""
    opened, entered = threading.Event(), threading.Semaphore(0)
    real = plain_policy.predict

    def wait(prepared):
        entered.release()
        assert opened.wait(30)
        return real(prepared)

    monkeypatch.setattr(plain_policy, "predict", wait)
    opened.set()
    opened.entered = entered
    return opened


def test_a_busy_server_is_asked_again_when_it_says_so(serve, plain_policy, gate):
    with serve(plain_policy, max_queue=1) as url, Client(url) as client, ThreadPoolExecutor(2) as pool:
        expected = client.predict_action(frame(), INSTRUCTION)
        while gate.entered.acquire(blocking=False):
            pass
        gate.clear()
        asked = [pool.submit(client.predict_action, frame(), INSTRUCTION)]
        gate.entered.acquire()
        asked.append(pool.submit(client.predict_action, frame(), INSTRUCTION))
        while "openvla_queue_length 1.0" not in client._http.get("/metrics").text:
            time.sleep(0.01)
        with Client(url, timeout=0.5) as hasty, pytest.raises(ServerError, match=r"queue is full.*503 busy") as raised:
            hasty.predict_action(frame(), INSTRUCTION)
        assert (raised.value.status, raised.value.kind, raised.value.retry_after) == (503, "busy", 1.0)
        threading.Timer(0.1, gate.set).start()
        np.testing.assert_array_equal(client.predict_action(frame(), INSTRUCTION), expected)
        for one in asked:
            np.testing.assert_array_equal(one.result(), expected)
    assert client.round_trip.longest > 1


def test_a_late_answer_is_never_returned(serve, plain_policy, gate):
    with serve(plain_policy) as url, Client(url, timeout=0.3) as client:
        gate.clear()
        with pytest.raises(ServerError, match=r"gave no answer within 0\.3 s\. Stop the robot") as raised:
            client.predict_action(frame(), INSTRUCTION)
        assert (raised.value.status, raised.value.kind) == (None, "timeout")
        assert client.round_trip.count == 0
        gate.set()
        client.timeout = 10.0
        np.testing.assert_array_equal(
            client.predict_action(frame(1), INSTRUCTION), predict(plain_policy, {"image": frame(1)})
        )


def test_a_server_that_accepts_and_never_answers_times_out():
    with (
        listening(lambda connection: connection.recv(1)) as url,
        Client(url, timeout=0.2) as client,
        pytest.raises(ServerError, match=re.escape(f"{url} gave no answer within 0.2 s.")),
    ):
        client.predict_action(frame(), INSTRUCTION)


def test_an_answer_that_trickles_in_is_not_waited_for_after_the_deadline():
    sent = []

    def drip(connection):
        connection.recv(2**20)
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 300\r\n\r\n")
            while len(sent) < 300:
                connection.sendall(b" ")
                sent.append(b" ")
                time.sleep(0.01)

    with (
        listening(drip) as url,
        Client(url, timeout=0.2) as client,
        pytest.raises(ServerError, match="gave no answer within"),
    ):
        client.predict_action(frame(), INSTRUCTION)
    assert len(sent) < 250


def test_a_request_that_trickles_out_is_given_up_at_the_deadline():
    received, is_over = [], threading.Event()

    def sip(connection):
        with contextlib.suppress(OSError):
            while part := connection.recv(2**17):
                received.append(len(part))
                time.sleep(0.01)
        is_over.set()

    with (
        listening(sip) as url,
        Client(url, timeout=0.5) as client,
        pytest.raises(ServerError, match="gave no answer within"),
    ):
        client.predict_action(frame(), "go" * 10_000_000)
    assert is_over.wait(30)
    assert sum(received) < 20_000_000


def test_nobody_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", timeout=0.2) as client,
        pytest.raises(ServerError, match=f"Cannot connect to http://127.0.0.1:{port}: .* Check the address"),
    ):
        client.info  # noqa: B018


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ("200 OK", b"<html>", "does not answer like an openvla-hf server"),
        ("200 OK", b'{"actions": [[NaN]]}', "does not answer like an openvla-hf server"),
        ("200 OK", b'{"actions": 3}', "does not answer like an openvla-hf server"),
        ("404 Not Found", b"<html>", r"/v1/act answered with an error\. \(404 http\)"),
    ],
)
def test_the_answer_of_another_program_is_an_error(head, body, message):
    def answer(connection):
        while read_message(connection):
            connection.sendall(f"HTTP/1.1 {head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    with listening(answer) as url, Client(url) as client:
        with pytest.raises(ServerError, match=message):
            client.predict_action(frame(), INSTRUCTION)
        with pytest.raises(ServerError, match=message.replace("/v1/act", "/info")):
            client.session()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_proxy_that_has_lost_its_server_is_asked_again(status):
    answers = [f"HTTP/1.1 {status} Gone\r\ncontent-length: 0\r\n\r\n"]
    answers += ['HTTP/1.1 200 OK\r\ncontent-length: 25\r\n\r\n{"actions": [[1.0, 2.5]]}']

    def answer(connection):
        while answers and read_message(connection):
            connection.sendall(answers.pop(0).encode())

    with listening(answer) as url, Client(url) as client:
        np.testing.assert_array_equal(client.predict_action(frame(), INSTRUCTION), [1.0, 2.5])


def test_a_token_is_needed_and_a_wrong_one_is_refused(serve, plain_policy):
    with serve(plain_policy, token="right") as url:
        for token in (None, "wrong"):
            with Client(url, token) as client, pytest.raises(ServerError, match=r"\(401 unauthorized\)") as raised:
                client.predict_action(frame(), INSTRUCTION)
            assert raised.value.status == 401
        with Client(url, "right") as client:
            assert client.predict_action(frame(), INSTRUCTION).shape == (7,)


def test_what_does_not_fit_the_policy_is_refused_with_the_reason(client):
    with pytest.raises(ServerError, match="no camera 'wrist': its cameras are 'image'") as raised:
        client.predict_action({"wrist": frame()}, INSTRUCTION)
    assert (raised.value.status, raised.value.kind) == (422, "unprocessable")
    assert raised.value.reason in str(raised.value)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"must be uint8 \(H, W, 3\) in RGB, got uint8 \(3, 8, 8\)"),
        (np.zeros((8, 8, 3)), ValueError, "got float64"),
        (Image.new("RGBA", (8, 8)), ValueError, "must have mode 'RGB' or 'L', got 'RGBA'"),
        ("frame.png", TypeError, "must be a PIL image or an array, got str"),
    ],
)
def test_an_image_that_cannot_be_sent_is_refused(client, image, error, message):
    with pytest.raises(error, match=message):
        client.predict_action(image, INSTRUCTION)


@pytest.mark.parametrize("state", [[0.0, np.nan], [[0.0, 1.0]], ["open"], "open"])
def test_a_state_that_cannot_be_sent_is_refused(client, state):
    with pytest.raises(ValueError, match="A state must"):
        client.predict_action(frame(), INSTRUCTION, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ws://localhost:8000"}, "must begin with http:// or https:// and a host, .* got 'ws:"),
        ({"url": "http://:x"}, "got 'http://:x'"),
        ({"url": "https://"}, "got 'https://'"),
        ({"token": "secret\n"}, "The token must consist of ASCII characters"),
        ({"token": ""}, "The token must"),
        ({"timeout": 0}, "`timeout` must be above 0"),
        ({"jpeg_quality": 101}, "`jpeg_quality` must be from 1 to 100"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Client(**{"url": "http://localhost:8000"} | arguments)
