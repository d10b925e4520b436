"""`openvla-hf serve` in a process of its own."""

import json
import os
import signal
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from http_bodies import as_json
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from openvla_hf.cli import main
from openvla_hf.serving.arrays import pack, unpack


# The command, without some packages, and with predictions that take long enough for a signal to come in between.
SLOW_SERVE = """
import sys, time
sys.modules |= dict.fromkeys(sys.argv.pop(1).split())
from openvla_hf.cli import main
from openvla_hf.serving.policy import ServedPolicy

predict = ServedPolicy.predict

def predict_slowly(self, prepared):
    time.sleep(0.5)
    return predict(self, prepared)

ServedPolicy.predict = predict_slowly
sys.exit(main(["serve", *sys.argv[1:]]))
"""
# For localhost and 127.0.0.1, with a key that everyone knows.
CERTIFICATE = str(Path(__file__).with_name("localhost.pem"))
TOKEN = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def folder(plain_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "plain"
    plain_policy.model.save_pretrained(folder)
    plain_policy.processor.save_pretrained(folder)
    return folder


def wait_for_line(process):
    while "\n" not in process.output():
        assert process.poll() is None, process.errors()
        time.sleep(0.02)
    return process.output().splitlines()[0]


def send_half_a_request(url, context):
    """Send a request whose body stops after one of its bytes, and give the connection."""
    host, port = url.removeprefix("https://").split(":")
    sender = context.wrap_socket(socket.create_connection((host, int(port)), timeout=20), server_hostname=host)
    sender.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\n")
    sender.sendall(b"Content-Length: 100\r\n\r\n{")
    return sender


@pytest.mark.parametrize("missing", ["", "uvloop"], ids=["fast", "plain"])
def test_a_signal_ends_the_server_after_its_last_answers(
    missing, folder, interpreters, plain_policy, make_observation, tmp_path
):
    (tmp_path / "token").write_text("s3cret\n")
    options = ["--port", "0", "--json", "--unnorm-key", "tiny", "--max-batch", "1", "--ssl-certfile", CERTIFICATE]
    process = interpreters.start(
        "-c", SLOW_SERVE, missing, str(folder), *options, "--token-file", str(tmp_path / "token"),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    ready = json.loads(wait_for_line(process))
    assert (ready["default_unnorm_key"], ready["model_id"]) == ("tiny", folder.name)
    assert ready["url"].startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    assert httpx.get(f"{ready['url']}/info", verify=trusting).status_code == 401
    with pytest.raises(InvalidStatus, match="401"):
        connect(ready["websocket"], ssl=trusting)
    seen = make_observation(plain_policy)
    with (
        connect(ready["websocket"], additional_headers=TOKEN, ssl=trusting) as openpi,
        httpx.Client(base_url=ready["url"], headers=TOKEN, timeout=30, verify=trusting) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        assert unpack(openpi.recv())["default_unnorm_key"] == "tiny"
        openpi.send(pack({"image": seen.images["image"], "prompt": seen.instruction}))
        answers = [pool.submit(client.post, "/v1/act", json=as_json(seen)) for _ in range(2)]
        while "openvla_queue_length 2.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        half = send_half_a_request(ready["url"], trusting)
        os.kill(process.pid, signal.SIGTERM)
        while (refused := client.get("/ready")).status_code == 200:
            time.sleep(0.01)
        assert (refused.status_code, refused.json()["error"]) == (503, "shutting_down")
        assert client.post("/v1/act", json=as_json(seen)).json()["error"] == "shutting_down"
        with half:
            answer = b"".join(iter(lambda: half.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"shutting_down"' in answer
        (expected,) = plain_policy.predict([plain_policy.prepare(seen)])
        for answer in answers:
            assert answer.result().status_code == 200
            np.testing.assert_allclose(answer.result().json()["actions"], expected.actions, atol=1e-6)
        np.testing.assert_allclose(unpack(openpi.recv())["actions"], expected.actions, atol=1e-6)
        with pytest.raises(ConnectionClosed):
            openpi.recv()
    assert process.wait() == 0, process.errors()
    assert process.errors() == ""
    assert process.output().count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--host 0.0.0.0", "Everyone who reaches 0.0.0.0 could command the robot: give a token with --token-file"),
        ("--unnorm-key nobody", "Unknown --unnorm-key 'nobody'"),
        ("--execute 2", "--execute"),
        ("--max-wait-ms -1", "--max-wait-ms must be a finite number of at least 0, got -1.0."),
        ("--max-wait-ms nan", "--max-wait-ms must be a finite number of at least 0, got nan."),
        ("--host nowhere.invalid", "The host 'nowhere.invalid' is unknown"),
        ("--host 203.0.113.1 --no-token", "Cannot listen on 203.0.113.1, port 0: Cannot assign requested address."),
        ("--port 70000", "--port must be at most 65535, got 70000."),
        ("--camera wrist", "must be CAMERA=KEY, got 'wrist'"),
        ("--ssl-keyfile {}/config.json", "give --ssl-certfile too"),
        ("--ssl-certfile {0}/config.json", "Cannot read a certificate from {0}/config.json"),
        ("--token-file {}/empty", "is empty"),
    ],
)
def test_a_wrong_option_is_one_sentence(folder, capsys, options, message):
    (folder / "empty").touch()
    try:
        status = main(["serve", str(folder), "--port", "0", *options.format(folder).split()])
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2
    assert message.format(folder) in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_missing_extra_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    message = "uvicorn is not installed: run `pip install 'openvla-hf[serve]'`."
    assert capsys.readouterr().err == f"openvla-hf: {message}\n"
