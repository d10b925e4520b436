import httpx
import numpy as np
import pytest
from http_bodies import as_file, as_json
from prometheus_client.parser import text_string_to_metric_families

from openvla_hf.serving.v1 import ActResponse, Info


@pytest.fixture(scope="module")
def plain(plain_policy, serve):
    """A client of a server of the plain policy."""
    with serve(plain_policy) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def chunks(chunk_policy, serve):
    with serve(chunk_policy) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def expected(policy, observation):
    (prediction,) = policy.predict([policy.prepare(observation)])
    return prediction.actions


def test_json_and_a_form_get_the_actions_of_the_policy(plain, plain_policy, make_observation):
    seen = make_observation(plain_policy)
    in_json = plain.post("/v1/act", json=as_json(seen))
    in_form = plain.post(
        "/v1/act", data={"instruction": seen.instruction}, files={"image": as_file(seen.images["image"])}
    )
    for response in (in_json, in_form):
        assert response.status_code == 200, response.text
        answer = ActResponse.model_validate(response.json())
        np.testing.assert_array_equal(answer.actions, expected(plain_policy, seen))
        assert (answer.unnorm_key, answer.batch_size, answer.details) == ("tiny", 1, None)
        assert answer.timings.total_ms >= answer.timings.model_ms > 0


def test_chunks_need_each_camera_and_the_state(chunks, chunk_policy, make_observation):
    seen = make_observation(chunk_policy)
    files = {name: as_file(image) for name, image in seen.images.items()}
    fields = {"instruction": seen.instruction, "state": str(seen.state.tolist())}
    for response in (
        chunks.post("/v1/act", json=as_json(seen)),
        chunks.post("/v1/act", data=fields, files=files),
    ):
        assert response.status_code == 200, response.text
        np.testing.assert_allclose(response.json()["actions"], expected(chunk_policy, seen), atol=1e-6)
    del files["wrist_image"]
    refused = chunks.post("/v1/act", data=fields, files=files)
    assert (refused.status_code, refused.json()["error"]) == (422, "unprocessable")
    assert "has no image from 'wrist_image'" in refused.json()["reason"]


def test_details_come_on_request(plain, plain_policy, make_observation):
    seen = make_observation(plain_policy)
    chosen = plain.post("/v1/act", json=as_json(seen, details="chosen")).json()["details"]
    every = plain.post("/v1/act", json=as_json(seen, details="all")).json()["details"]
    assert chosen["bin_probabilities"] is None
    assert np.shape(every["bin_probabilities"]) == (1, 7, 256)
    np.testing.assert_allclose(np.sum(every["bin_probabilities"], -1), 1, atol=1e-4)
    np.testing.assert_allclose(np.max(every["bin_probabilities"], -1), chosen["probabilities"])
    assert np.shape(chosen["token_ids"]) == np.shape(chosen["entropy"]) == (1, 7)


def test_the_info_describes_the_policy_and_the_limits(plain, plain_policy):
    info = Info.model_validate(plain.get("/info").json())
    assert info.model_dump(exclude={"limits"}) == plain_policy.describe()
    assert info.limits.max_instruction == 1000


def test_a_running_server_is_alive_and_ready(plain):
    assert plain.get("/health").json() == {"status": "ok"}
    assert plain.get("/ready").json() == {"status": "ready"}


def test_metrics_can_be_parsed(plain, plain_policy, make_observation):
    def count():
        families = {one.name: one for one in text_string_to_metric_families(plain.get("/metrics").text)}
        samples = families["openvla_requests"].samples
        return sum(one.value for one in samples if one.labels.get("outcome") == "ok" and one.name.endswith("_total"))

    before = count()
    plain.post("/v1/act", json=as_json(make_observation(plain_policy)))
    assert count() == before + 1


def test_metrics_count_each_error_once(plain, plain_policy, make_observation):
    def count():
        families = {one.name: one for one in text_string_to_metric_families(plain.get("/metrics").text)}
        samples = [one for one in families["openvla_requests"].samples if one.name.endswith("_total")]
        return {one.labels["outcome"]: one.value for one in samples}

    before = count()
    plain.post("/v1/act", json={})
    plain.post("/v1/act", json=as_json(make_observation(plain_policy), unnorm_key="nobody"))
    plain.post("/act", content=b"{")
    plain.post("/v1/act", json=as_json(make_observation(plain_policy), session="nobody"))
    plain.post("/v1/sessions/nobody/reset")
    plain.delete("/v1/sessions/nobody")
    after = count()
    expected = {"unprocessable": 2, "bad_request": 1, "session_expired": 3}
    assert {kind: after[kind] - before.get(kind, 0) for kind in expected} == expected


def test_a_session_lives_until_it_is_closed(plain, plain_policy, make_observation):
    opened = plain.post("/v1/sessions")
    assert opened.status_code == 201
    session = opened.json()["session"]
    body = as_json(make_observation(plain_policy), session=session, details="chosen")
    first, again = (plain.post("/v1/act", json=body).json() for _ in range(2))
    assert again["actions"] == first["actions"]
    assert again["details"]["forward_passes"] < first["details"]["forward_passes"]
    assert plain.post(f"/v1/sessions/{session}/reset").status_code == 204
    fresh = plain.post("/v1/act", json=body).json()
    assert fresh["details"]["forward_passes"] == first["details"]["forward_passes"]
    assert plain.delete(f"/v1/sessions/{session}").status_code == 204
    for response in (plain.post("/v1/act", json=body), plain.delete(f"/v1/sessions/{session}")):
        assert (response.status_code, response.json()["error"]) == (410, "session_expired")
