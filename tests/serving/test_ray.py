"""Replicas on Ray Serve: a real cluster on this machine, with two replicas of one policy."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml
from conforming_client import OpenpiClient
from http_bodies import as_json
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from openvla_hf.serving.client import SESSION_HEADER, Client, ServerError
from openvla_hf.serving.policy import ServedPolicy


ROOT = Path(__file__).parents[2]
TOKEN = "s3cret"
ROBOTS = 8
SINGLE = 4  # robots that repeat no request
REPLICAS = 2
TIMEOUT = 60.0
START_SECONDS = 300.0
MAX_BODY = 2**20
AUTOSCALING = {
    "max_replicas": REPLICAS,
    "target_ongoing_requests": 0.2,  # so little that the requests of one client suffice
    "upscale_delay_s": 0.5,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
    "downscale_delay_s": 3600,
}


@pytest.fixture(scope="module")
def folder(plain_policy, tmp_path_factory):
    """A folder with the tiny policy and the token."""
    folder = tmp_path_factory.mktemp("ray")
    plain_policy.model.save_pretrained(folder / "plain")
    plain_policy.processor.save_pretrained(folder / "plain")
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def cluster(ray, folder):
    """The address of the tiny policy behind Ray's proxy: one replica, and another as soon as there is some load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "openvla_hf.serving.ray_proxy:proxy_middlewares")
        variables.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        # On a busy machine, Ray would stop the proxy before it has started.
        variables.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(START_SECONDS))
        variables.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", str(TIMEOUT))
        variables.setenv("RAY_USAGE_STATS_ENABLED", "0")
        variables.setenv("HF_HUB_OFFLINE", "1")
        from ray import serve

        from openvla_hf.serving.ray import Settings, app

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(
            model=str(folder / "plain"),
            unnorm_key="tiny",
            token_file=str(folder / "token"),
            options={"max_body_bytes": MAX_BODY},
            deployment={"ray_actor_options": {"num_cpus": 0.5}, "autoscaling_config": AUTOSCALING},
        )
        serve.run(app(settings))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def server(cluster):
    """A client of the HTTP API."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=cluster, headers=headers, timeout=START_SECONDS) as client:
        yield client


@pytest.fixture
def both(server):
    """Waits until both replicas take requests."""
    wait_until(lambda: len({any_replica(server) for _ in range(8)}) == REPLICAS)


@pytest.fixture(scope="module")
def cases(plain_policy, make_observation):
    """Observations of robots, and the action for each of them alone."""
    seen = [make_observation(plain_policy, seed=robot) for robot in range(ROBOTS)]
    return [(one, plain_policy.predict([plain_policy.prepare(one)])[0].actions[0]) for one in seen]


def wait_until(condition):
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "It did not happen."
        time.sleep(0.02)


def open_session(server):
    return server.post("/v1/sessions").raise_for_status().json()["session"]


def act(server, seen, session):
    return server.post("/v1/act", json=as_json(seen, session=session), headers={SESSION_HEADER: session})


def close_session(server, session):
    server.delete(f"/v1/sessions/{session}", headers={SESSION_HEADER: session}).raise_for_status()


def replica_of(session):
    return session.partition(".")[0]


def any_replica(server):
    session = open_session(server)
    close_session(server, session)
    return replica_of(session)


def kill(replica):
    """Kill the process of a replica, which is the one that writes the replica's log, and return the time."""
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE and any(replica in file.path for file in process.open_files()):
            killed_at = time.monotonic()
            os.kill(process.pid, signal.SIGKILL)
            return killed_at
    raise AssertionError(f"No process belongs to replica {replica}.")


def repeat(ask, expected, stop, times):
    """Act until told to stop, and note when each request began and ended, and whether it got an answer."""
    while not stop.is_set():
        started = time.monotonic()
        action = ask()
        times.append((started, time.monotonic(), action is not None))
        if action is not None:
            np.testing.assert_allclose(action, expected, atol=1e-6)


def run_client(cluster, case, in_session, stop, times):
    """A robot with this package's client, which repeats requests by itself."""
    seen, expected = case
    with Client(cluster, TOKEN, timeout=TIMEOUT) as client:
        asking = client.session() if in_session else client
        repeat(lambda: asking.predict_action(seen.images["image"], seen.instruction), expected, stop, times)


def run_single_requests(server, case, stop, times):
    """A robot that repeats nothing."""
    seen, expected = case

    def ask():
        answer = server.post("/v1/act", json=as_json(seen))
        if answer.is_success:
            return answer.json()["actions"][0]
        assert (answer.status_code, answer.json()["error"]) == (503, "replica_lost")
        return None

    repeat(ask, expected, stop, times)


def test_load_adds_a_replica_and_sessions_stay_with_theirs(server, cases):
    sessions = [open_session(server) for _ in range(4)]
    known = {replica_of(session) for session in sessions}
    stop = threading.Event()
    with ThreadPoolExecutor(ROBOTS) as pool:
        robots = [pool.submit(run_single_requests, server, case, stop, []) for case in cases]
        try:
            wait_until(lambda: any_replica(server) not in known or any(robot.done() for robot in robots))
        finally:
            stop.set()
        for robot in robots:
            robot.result()
    for session in sessions:
        act(server, cases[0][0], session).raise_for_status()


def test_requests_of_a_session_reach_its_replica(server, both, cases):
    seen, expected = cases[0]
    sessions = [open_session(server) for _ in range(12)]
    assert len(set(map(replica_of, sessions))) == REPLICAS
    for session in sessions * 2:
        answer = act(server, seen, session).raise_for_status()
        np.testing.assert_allclose(answer.json()["actions"][0], expected, atol=1e-6)
    for session in sessions:
        close_session(server, session)


def test_replicas_describe_themselves_as_a_single_server_does(server, serve, folder):
    policy = ServedPolicy.load(str(folder / "plain"), unnorm_key="tiny")
    with serve(policy, max_body_bytes=MAX_BODY) as url:
        assert server.get("/info").raise_for_status().json() == httpx.get(f"{url}/info").json()


def test_both_replicas_answer_requests_without_a_session(server, both, cases):
    body = as_json(cases[0][0])

    def ask(_):
        return server.post("/v1/act", json=body).raise_for_status()

    def counts():
        found = set()
        while len(found) < REPLICAS:
            session = open_session(server)
            text = server.get("/metrics", headers={SESSION_HEADER: session}).text
            found.add((replica_of(session), float(text.split('outcome="ok"} ')[1].split("\n")[0])))
        return dict(found)

    before = counts()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))
    assert all(count > before[replica] for replica, count in counts().items())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({}, 422),
    ],
)
def test_the_checks_of_a_request_hold_behind_the_proxy(server, headers, status):
    assert server.post("/v1/act", json={}, headers=headers).status_code == status


def test_a_large_body_is_refused_behind_the_proxy(server):
    assert server.post("/v1/act", content=b"0" * (MAX_BODY + 1)).status_code == 413
    chunks = (b"0" * 2**16 for _ in range(MAX_BODY // 2**16 + 1))
    assert server.post("/v1/act", content=chunks, headers={"Content-Type": "application/json"}).status_code == 413


def test_openpi_clients_act_behind_the_proxy(cluster, server, cases):
    with OpenpiClient(cluster, TOKEN) as client:
        assert client.get_server_metadata()["server"] == "openvla-hf"
        for seen, expected in cases[:3]:
            reply = client.infer({"image": seen.images["image"], "prompt": seen.instruction})
            np.testing.assert_allclose(reply["actions"][0], expected, atol=1e-6)


def test_a_wrong_token_reaches_the_client_as_an_error(cluster, server, cases):
    with Client(cluster, "wrong", timeout=TIMEOUT) as client, pytest.raises(ServerError, match="The token is wrong"):
        client.predict_action(cases[0][0].images["image"], "pick up the red block")


def test_a_killed_replica_under_load_loses_only_its_requests_and_clients_repeat_them(cluster, server, both, cases):
    stop = threading.Event()
    times = [[] for _ in cases]
    with ThreadPoolExecutor(ROBOTS) as pool:
        robots = [
            pool.submit(run_single_requests, server, case, stop, times[robot])
            if robot < SINGLE
            else pool.submit(run_client, cluster, case, robot % 2 == 0, stop, times[robot])
            for robot, case in enumerate(cases)
        ]

        def wait_for(more):
            targets = [len(one) + more for one in times]
            wait_until(
                lambda: (
                    all(len(one) >= target for one, target in zip(times, targets, strict=True))
                    or any(robot.done() for robot in robots)
                )
            )

        try:
            wait_for(10)
            killed_at = kill(any_replica(server))
            wait_for(20)
        finally:
            stop.set()
        for robot in robots:
            robot.result()
    requests = [one for each in times for one in each]
    in_flight = [one for one in requests if one[0] < killed_at < one[1]]
    lost = [one for one in requests if not one[2]]
    slowest = max(ended - started for started, ended, _ in requests)
    print(f"{len(requests)} requests, {len(in_flight)} in flight, {len(lost)} lost, slowest {slowest:.2f} s")
    assert set(lost) <= set(in_flight)


def test_a_replica_that_dies_with_a_request_is_answered_with_503(cluster, server, both, cases):
    """A request of which only half has arrived is in a replica for sure."""
    host, port = cluster.removeprefix("http://").split(":")
    session = open_session(server)
    headers = {"Authorization": f"Bearer {TOKEN}", SESSION_HEADER: session}
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection,
        connect(cluster.replace("http", "ws", 1), additional_headers=headers, proxy=None) as openpi,
    ):
        openpi.recv(TIMEOUT)  # the metadata
        lines = [
            "POST /v1/act HTTP/1.1",
            f"Host: {host}:{port}",
            f"Authorization: Bearer {TOKEN}",
            "Content-Type: application/json",
            "Content-Length: 1000",
            f"{SESSION_HEADER}: {session}",
        ]
        connection.sendall("\r\n".join([*lines, "", "{"]).encode())
        time.sleep(1)  # until the replica reads the body
        kill(replica_of(session))
        answer = connection.recv(65536).decode()
        while "replica_lost" not in answer:
            more = connection.recv(65536).decode()
            assert more, answer
            answer += more
        with pytest.raises(ConnectionClosed):
            openpi.recv(TIMEOUT)
    assert answer.startswith("HTTP/1.1 503")
    assert "retry-after: 0" in answer.lower()
    expired = act(server, cases[0][0], session)
    assert (expired.status_code, expired.json()["error"]) == (410, "session_expired")


def test_replicas_need_a_token_unless_told_otherwise(ray, monkeypatch):
    from openvla_hf.serving.ray import Settings, app, load_service

    monkeypatch.delenv("OPENVLA_HF_SERVER_TOKEN", raising=False)
    with pytest.raises(ValueError, match="could command the robot"):
        load_service(Settings(model="nobody/nothing"), "replica")
    with pytest.raises(ValueError, match="Ray shows settings in its dashboard"):
        app(Settings(model="nobody/nothing", options={"token": "s3cret"}))


@pytest.mark.parametrize(
    "settings", [{"gripers": "binary"}, {"options": {"max_bach": 4}}, {"options": {"max_batch": 0}}]
)
def test_a_wrong_setting_is_an_error(ray, settings):
    from openvla_hf.serving.ray import Settings

    with pytest.raises(ValueError, match=r"gripers|max_bach|`max_batch` must be at least 1"):
        Settings(model="nobody/nothing", **settings)


def test_a_replica_on_a_gpu_gets_one_and_the_number_of_replicas_follows_the_load(ray):
    from openvla_hf.serving.ray import Settings, deployment_arguments

    arguments = deployment_arguments(Settings(model="nobody/nothing", device="cuda", options={"max_batch": 4}))
    assert arguments["ray_actor_options"] == {"num_gpus": 1}
    assert arguments["autoscaling_config"] == {"max_replicas": 8, "target_ongoing_requests": 4}
    settings = Settings(model="nobody/nothing", deployment={"num_replicas": 2, "ray_actor_options": {"num_cpus": 4}})
    arguments = deployment_arguments(settings)
    assert arguments["ray_actor_options"] == {"num_cpus": 4}
    assert "autoscaling_config" not in arguments


def test_the_command_and_the_file_of_the_page_are_valid(ray):
    from ray.serve.schema import ServeDeploySchema

    from openvla_hf.serving.ray import Settings, app

    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    file = page.split('```yaml title="serve.yaml"\n')[1].split("```")[0]
    (application,) = ServeDeploySchema(**yaml.safe_load(file)).applications
    target, *settings = page.split("\nserve run ")[1].split("\n")[0].split()
    assert target == application.import_path == f"{app.__module__}:{app.__name__}"
    for arguments in (application.args, dict(one.split("=") for one in settings)):
        app(Settings(**arguments))
