import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from conforming_client import ActionChunkBroker, OpenpiClient, pack
from pages import ROOT, read_blocks
from websockets.exceptions import ConnectionClosed, InvalidStatus

from openvla_hf.serving.policy import ServedPolicy


FRAMES = 1000
FUZZ_EXAMPLES = int(os.environ.get("OPENVLA_FUZZ_EXAMPLES", "200"))
CLOSED_BY_FAULT = 1011


def to_libero(observation, **more):
    """The observation of a LIBERO client."""
    images = iter(observation.images.values())
    keys = zip(("observation/image", "observation/wrist_image"), images, strict=False)
    state = {} if observation.state is None else {"observation/state": observation.state}
    return {**dict(keys), **state, "prompt": observation.instruction, **more}


def single_calls(policy, observations):
    """The actions of one robot's observations, in order, without a server."""
    session = policy.open_session()
    return [session.receive(policy.predict([policy.prepare(session.observe(one))])[0]) for one in observations]


def closing_code(client):
    with pytest.raises(ConnectionClosed) as raised:
        client.socket.recv()
    return raised.value.rcvd.code if raised.value.rcvd else None


@pytest.fixture(scope="module")
def plain_server(serve, plain_policy):
    with serve(plain_policy, max_body_bytes=2**20) as url:
        yield url


@pytest.fixture(scope="module")
def chunk_server(serve, chunk_policy):
    with serve(chunk_policy) as url:
        yield url


def test_the_metadata_comes_first_and_says_what_clients_must_send(chunk_server, chunk_policy):
    with OpenpiClient(chunk_server) as client:
        metadata = client.metadata
    assert (metadata["protocol"], metadata["protocol_version"]) == ("openpi", 1)
    assert metadata["model_id"] == Path(chunk_policy.model_id).name
    assert metadata["unnorm_keys"] == list(chunk_policy.model.norm_stats)
    assert metadata["default_unnorm_key"] == chunk_policy.default_key
    assert (metadata["action_dim"], metadata["action_horizon"], metadata["state_dim"]) == (7, 8, 8)
    assert [camera["name"] for camera in metadata["cameras"]] == ["full_image", "wrist_image"]
    assert {"height", "width", "resize", "center_crop_area"} < set(metadata["cameras"][0])
    assert metadata["gripper"]["convention"] == "policy"
    assert metadata.keys() >= {"revision", "control_frequency"}


@pytest.fixture
def predicted_once(plain_policy, monkeypatch):
    """The policy remembers its predictions, so that many frames take little time."""
    predict, known = plain_policy.predict, {}

    def recall(batch):
        inputs = batch[0].inputs["pixel_values"].numpy().tobytes()
        if len(batch) > 1 or inputs not in known:
            known[inputs] = predict(batch)
        return known[inputs]

    monkeypatch.setattr(plain_policy, "predict", recall)
    return plain_policy


def test_a_thousand_frames_get_the_actions_of_single_calls(plain_server, predicted_once, make_observation):
    seen = [make_observation(predicted_once, seed) for seed in range(10)]
    expected = single_calls(predicted_once, seen)
    with OpenpiClient(plain_server) as client:
        for step in range(FRAMES):
            reply = client.infer(to_libero(seen[step % len(seen)]))
            np.testing.assert_array_equal(reply["actions"], expected[step % len(seen)])


def test_a_reply_has_the_actions_and_the_times(chunk_server, make_observation, chunk_policy):
    message = to_libero(make_observation(chunk_policy))
    with OpenpiClient(chunk_server) as client:
        first, second = client.infer(message), client.infer(message)
    assert first["actions"].shape == (8, 7)
    assert first["actions"].dtype == np.float64
    assert "prev_total_ms" not in first["server_timing"]
    timing = second["server_timing"]
    assert timing["prev_total_ms"] >= first["server_timing"]["infer_ms"] >= first["server_timing"]["model_ms"] > 0
    assert timing["batch_size"] == 1
    assert second["policy_timing"]["infer_ms"] == timing["model_ms"]


def test_a_client_plays_the_chunks_step_by_step(chunk_server, chunk_policy, make_observation):
    seen = [make_observation(chunk_policy, seed) for seed in range(2)]
    expected = np.concatenate(single_calls(chunk_policy, seen))
    with OpenpiClient(chunk_server) as client:
        player = ActionChunkBroker(client, client.metadata["action_horizon"])
        played = [player.infer(to_libero(seen[step // 8]))["actions"] for step in range(16)]
    np.testing.assert_array_equal(played, expected)


@pytest.mark.parametrize("name", ["droid", "aloha", "nested"])
def test_clients_of_other_robots_are_answered(plain_server, plain_policy, make_observation, name):
    observation = make_observation(plain_policy)
    (image,) = observation.images.values()
    message = {
        "droid": {
            "observation/exterior_image_1_left": image,
            "observation/wrist_image_left": image[::-1],
            "observation/joint_position": np.zeros(7),
            "observation/gripper_position": np.zeros(1),
        },
        "aloha": {"state": np.zeros(14), "images": {"cam_high": image.transpose(2, 0, 1), "cam_low": image[..., :1]}},
        "nested": {"observation": {"image": np.float32(image) / 255}},
    }[name]
    with OpenpiClient(plain_server) as client:
        reply = client.infer({**message, "prompt": observation.instruction})
    np.testing.assert_array_equal(reply["actions"], single_calls(plain_policy, [observation])[0])


def test_a_client_chooses_the_statistics(plain_server, plain_policy, make_observation):
    observation = make_observation(plain_policy, unnorm_key="half")
    with OpenpiClient(plain_server) as client:
        reply = client.infer(to_libero(observation, unnorm_key="half"))
    np.testing.assert_array_equal(reply["actions"], single_calls(plain_policy, [observation])[0])


def test_each_connection_is_an_episode_of_its_own(serve, chunk_policy, make_observation):
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)
    robots = [[make_observation(policy, 10 * robot + step) for step in range(4)] for robot in range(2)]
    expected = [single_calls(policy, seen) for seen in robots]
    with serve(policy) as url, OpenpiClient(url) as one, OpenpiClient(url) as other:
        for step in range(4):
            for robot, client in enumerate((one, other)):
                reply = client.infer(to_libero(robots[robot][step]))
                np.testing.assert_array_equal(reply["actions"], expected[robot][step])
        with OpenpiClient(url) as again:  # a reconnection starts a new episode
            np.testing.assert_array_equal(again.infer(to_libero(robots[0][0]))["actions"], expected[0][0])
        reply = one.infer(to_libero(robots[0][0], reset=True))
        np.testing.assert_array_equal(reply["actions"], expected[0][0])
        reply = one.infer(to_libero(robots[0][1]))
        np.testing.assert_array_equal(reply["actions"], expected[0][1])


def test_robots_that_act_at_once_get_their_own_actions(plain_server, plain_policy, make_observation):
    seen = [make_observation(plain_policy, seed) for seed in range(4)]
    seen = [dataclasses.replace(one, instruction=f"task {'very ' * robot}") for robot, one in enumerate(seen)]
    expected = [single_calls(plain_policy, [one])[0] for one in seen]

    def act(robot):
        with OpenpiClient(plain_server) as client:
            replies = [client.infer(to_libero(seen[robot])) for _ in range(20)]
        for reply in replies:
            np.testing.assert_allclose(reply["actions"], expected[robot], atol=1e-5)
        return [reply["server_timing"]["batch_size"] for reply in replies]

    with ThreadPoolExecutor(len(seen)) as threads:
        sizes = [size for robot in threads.map(act, range(len(seen))) for size in robot]
    assert len(sizes) == 80
    assert max(sizes) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda message: message.pop("prompt"), "no instruction"),
        (lambda message: message.pop("observation/image"), r"no image of the camera 'image'.*--camera image=KEY"),
        (lambda message: message.update(unnorm_key="tiney"), "tiny"),
        (lambda message: message.update(prompt=" "), "instruction is empty"),
        (lambda message: message.update(prompt="x" * 1001), "has 1001 characters"),
        (lambda message: message.update(reset=1), "'reset' must be true or false"),
        (lambda message: message.update({"observation/image": np.zeros((5, 5, 2), np.uint8)}), "not an image"),
        (lambda message: message.update({"observation/image": np.zeros((5, 5, 4), np.uint8)}), "has four channels"),
        (lambda message: message.update(more=bytes(2**20)), "takes at most 1048576"),
    ],
)
def test_an_error_is_one_sentence_in_a_text_frame_and_the_connection_closes(
    plain_server, plain_policy, make_observation, change, message
):
    observation = to_libero(make_observation(plain_policy))
    with OpenpiClient(plain_server) as client:
        client.infer(observation)
        change(observation)
        with pytest.raises(RuntimeError, match=message) as raised:
            client.infer(observation)
        assert "Traceback" not in str(raised.value)
        assert str(raised.value).endswith(".")
        assert closing_code(client) == CLOSED_BY_FAULT


def test_a_policy_that_fails_closes_the_connection_and_the_next_one_acts(
    plain_server, plain_policy, make_observation, monkeypatch
):
    observation = make_observation(plain_policy)

    def fail(batch):
        raise RuntimeError("The kernel is broken")

    with OpenpiClient(plain_server) as client:
        with monkeypatch.context() as broken:
            broken.setattr(plain_policy, "predict", fail)
            with pytest.raises(RuntimeError, match="Error in inference server:\nRuntimeError: The kernel is broken"):
                client.infer(to_libero(observation))
        assert closing_code(client) == CLOSED_BY_FAULT
    with OpenpiClient(plain_server) as client:
        reply = client.infer(to_libero(observation))
    np.testing.assert_array_equal(reply["actions"], single_calls(plain_policy, [observation])[0])


def test_a_text_frame_is_an_error(plain_server):
    with OpenpiClient(plain_server) as client:
        client.socket.send('{"prompt": "go"}')
        assert "got a text frame" in client.socket.recv()
        assert closing_code(client) == CLOSED_BY_FAULT


def test_a_session_ends_with_its_connection_whatever_way_it_closes(serve, plain_policy, make_observation):
    message = to_libero(make_observation(plain_policy))

    def leave(client):
        client.socket.close()

    def break_off(client):
        client.socket.socket.shutdown(socket.SHUT_RDWR)

    def break_off_in_mid_request(client):
        client.socket.send(pack(message))
        client.socket.socket.shutdown(socket.SHUT_RDWR)

    def fail(client):
        with pytest.raises(RuntimeError):
            client.infer({})

    # Each connection takes the only session, which must be free again for the next.
    with serve(plain_policy, max_sessions=1) as url:
        for end in (leave, break_off, break_off_in_mid_request, fail, leave):
            client = connect_when_free(url)
            client.infer(message)
            end(client)
            client.socket.close()


def connect_when_free(url):
    for _ in range(200):
        with contextlib.suppress(InvalidStatus):
            return OpenpiClient(url)
        threading.Event().wait(0.02)
    raise AssertionError("The session is not forgotten.")


def test_a_server_without_room_for_a_session_refuses_the_connection_with_a_reason(serve, plain_policy):
    with serve(plain_policy, max_sessions=1) as url, OpenpiClient(url):
        with pytest.raises(InvalidStatus) as raised:
            OpenpiClient(url)
        assert raised.value.response.status_code == 429
        assert b"open sessions: close one" in raised.value.response.body
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert b'openvla_requests_total{outcome="too_many_requests"} 1.0' in answer.read()


def test_clients_send_the_token_as_an_api_key(serve, plain_policy, make_observation):
    with serve(plain_policy, token="secret") as url:
        for key in (None, "wrong"):
            with pytest.raises(InvalidStatus) as raised:
                OpenpiClient(url, key)
            assert raised.value.response.status_code == 401
        with OpenpiClient(url, "secret") as client:
            assert client.infer(to_libero(make_observation(plain_policy)))["actions"].shape == (1, 7)
        with urllib.request.urlopen(f"{url}/healthz") as answer:
            assert answer.status == 200


def test_the_loop_of_the_docs_acts(serve, chunk_policy, make_observation, monkeypatch, tmp_path):
    (block,) = (one for one in read_blocks(ROOT / "docs/serving.md") if one.title == "openpi_robot.py")
    stats = chunk_policy.model.norm_stats["tiny"]["action"]
    for name, value in {"q01": 0.0, "q99": 1.0}.items():
        monkeypatch.setitem(stats, name, [*stats[name][:-1], value])
    policy = ServedPolicy(chunk_policy.model, chunk_policy.processor, gripper="libero")
    seen = [make_observation(policy, seed) for seed in range(10)]
    # The published client needs NumPy 1.
    for name, value in {
        "action_chunk_broker": SimpleNamespace(ActionChunkBroker=ActionChunkBroker),
        "websocket_client_policy": SimpleNamespace(
            WebsocketClientPolicy=lambda host, port, api_key: OpenpiClient(url, api_key)
        ),
    }.items():
        monkeypatch.setitem(sys.modules, f"openpi_client.{name}", value)
    monkeypatch.setitem(sys.modules, "openpi_client", SimpleNamespace())
    monkeypatch.chdir(tmp_path)
    Path("token.txt").write_text("secret\n")
    views, moves = iter(seen), []
    robot = SimpleNamespace(
        observe=lambda: (*(one := next(views)).images.values(), one.state), act=lambda action: moves.append(action)
    )
    with serve(policy, token="secret") as url:
        exec(block.code, names := {})
        names["run_episode"](robot, seen[0].instruction, steps=10)
        names["client"].socket.close()
    np.testing.assert_array_equal(moves, np.concatenate(single_calls(policy, [seen[0], seen[8]]))[:10])


def test_the_client_on_pypi_acts(openpi_client, serve, chunk_policy, make_observation, tmp_path):
    seen = [make_observation(chunk_policy, seed) for seed in range(3)]
    images, wrists = (np.stack([one.images[name] for one in seen]) for name in ("full_image", "wrist_image"))
    states, path = np.stack([one.state for one in seen]), tmp_path / "observations.npz"
    np.savez(path, images=images, wrists=wrists, states=states, prompt=seen[0].instruction)
    script = Path(__file__).with_name("real_openpi_client.py")
    with serve(chunk_policy, token="secret") as url:
        output = subprocess.run(
            [openpi_client, "-W", "ignore", script, url, "secret", path], capture_output=True, text=True, check=True
        ).stdout
    got = json.loads(output)
    np.testing.assert_array_equal(got["played"], np.concatenate(single_calls(chunk_policy, seen)))
    assert got["metadata"] == {"protocol": "openpi", "protocol_version": 1, **chunk_policy.describe()}
    assert got["error"].startswith("Error in inference server:\nThe observation has no image")


def test_the_health_check_answers_ok(plain_server):
    with urllib.request.urlopen(f"{plain_server}/healthz") as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")


@pytest.fixture
def gate(plain_policy, monkeypatch):
    """Predictions wait until the gate is set. `gate.entered` counts them."""
    predict, gate = plain_policy.predict, threading.Event()
    gate.entered = threading.Semaphore(0)

    def wait(batch):
        gate.entered.release()
        assert gate.wait(20)
        return predict(batch)

    with monkeypatch.context() as patched:
        patched.setattr(plain_policy, "predict", wait)
        yield gate


def test_pings_are_answered_while_the_policy_predicts(plain_server, plain_policy, make_observation, gate):
    with OpenpiClient(plain_server) as client:
        client.socket.send(pack(to_libero(make_observation(plain_policy))))
        assert gate.entered.acquire(timeout=20)
        assert client.socket.ping().wait(20)
        gate.set()
        assert client.receive()["actions"].shape == (1, 7)


def test_observations_that_are_sent_ahead_are_answered_in_order(plain_server, plain_policy, make_observation):
    seen = [make_observation(plain_policy, seed) for seed in range(4)]
    with OpenpiClient(plain_server) as client:
        for one in seen:
            client.socket.send(pack(to_libero(one)))
        actions = [client.receive()["actions"] for _ in seen]
    np.testing.assert_array_equal(actions, single_calls(plain_policy, seen))


def test_a_client_that_leaves_while_it_waits_takes_no_prediction(plain_server, plain_policy, make_observation, gate):
    message = pack(to_libero(make_observation(plain_policy)))
    with OpenpiClient(plain_server) as client:
        client.socket.send(message)
        assert gate.entered.acquire(timeout=20)
        with OpenpiClient(plain_server) as gone:
            gone.socket.send(message)
            wait_for(plain_server, "openvla_queue_length 1.0")
        wait_for(plain_server, "openvla_queue_length 0.0")
        gate.set()
        client.receive()
    assert not gate.entered.acquire(blocking=False)


def wait_for(server, metric):
    for _ in range(1000):
        with urllib.request.urlopen(f"{server}/metrics") as answer:
            if metric in answer.read().decode():
                return
        threading.Event().wait(0.01)
    raise AssertionError(f"never {metric}")


def mutate(data, rng):
    """Change, delete, insert or repeat a few bytes; more often near the start, where the structure is."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = min(int(rng.expovariate(1 / 60)), len(data) - 1) if rng.random() < 0.7 else rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                del data[place : place + rng.choice([1, 2, 8])]
            case 3:
                data[place:place] = rng.choice([rng.randbytes(3), b"\xdd\xff\xff\xff\xff", b"\x91" * 40, b"\xc0"])
            case 4:
                del data[place + 1 :]
    return bytes(data)


def test_damaged_frames_get_a_sentence_or_an_answer_and_the_server_lives_on(
    plain_server, plain_policy, make_observation
):
    observation = make_observation(plain_policy)
    image = next(iter(observation.images.values()))[:6, :6]
    message = {"observation/image": image, "observation/state": np.float32([1, 2]), "prompt": "go", "reset": False}
    rng, client, outcomes = random.Random(0), OpenpiClient(plain_server), []
    for _ in range(FUZZ_EXAMPLES):
        client.socket.send(mutate(pack(message), rng))
        reply = client.socket.recv()
        outcomes.append(type(reply))
        if isinstance(reply, str):
            assert reply.endswith(".")
            assert closing_code(client) == CLOSED_BY_FAULT
            client.socket.close()
            client = OpenpiClient(plain_server)
        else:
            assert msgpack.unpackb(reply)["actions"][b"shape"] == [1, 7]
    client.socket.close()
    assert {*outcomes} == {str, bytes}
    with OpenpiClient(plain_server) as client:
        reply = client.infer(to_libero(observation))
    np.testing.assert_array_equal(reply["actions"], single_calls(plain_policy, [observation])[0])
