import base64
import io
import json

import httpx
import numpy as np
import pytest
from browser import open_browser
from PIL import Image


SHOWN = "!document.getElementById('{}').hidden"
TOKEN = "sesame"


@pytest.fixture(scope="module")
def new_page(chromium):
    with open_browser(chromium) as opened:
        yield opened


@pytest.fixture(scope="module")
def tabletop_policy():
    from openvla_hf.serving.policy import ServedPolicy
    from openvla_hf.tabletop.rollouts import TABLETOP_POLICY

    return ServedPolicy.load(str(TABLETOP_POLICY))


@pytest.fixture(scope="module")
def picture(tmp_path_factory, plain_policy, make_observation):
    image = Image.fromarray(make_observation(plain_policy).images["image"])
    path = tmp_path_factory.mktemp("pictures") / "frame.png"
    image.save(path)
    return path


def test_an_action_can_be_asked_for_with_the_keyboard_alone(new_page, serve, plain_policy, picture):
    (prediction,) = plain_policy.predict([plain_policy.prepare(observe(picture))])
    with serve(plain_policy) as url:
        page = new_page()
        page.resize(1280, 900)
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("ask"))
        page.focus(".drop")
        page.call("Page.setInterceptFileChooserDialog", enabled=True)
        page.press("Enter")
        page.choose_file("#cameras input", picture)
        page.focus("#instruction")
        page.type("pick up the red block")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("answer"))
        values = page.run("[...document.querySelectorAll('#actions tbody td:nth-child(2)')].map(one => one.innerText)")
        shown = [float(value.replace("\N{MINUS SIGN}", "-")) for value in values]
        assert shown == pytest.approx(prediction.actions[0], abs=1e-4)
        assert page.run("[...document.querySelectorAll('#actions svg')].map(one => one.childElementCount)") == [65] * 7
        assert "forward passes: 7" in page.text("#timing")
        assert page.problems == []


def observe(path, **fields):
    from openvla_hf.serving.policy import Observation

    return Observation({"image": Image.open(path)}, "pick up the red block", **fields)


def test_other_statistics_can_be_chosen(new_page, serve, plain_policy, picture):
    with serve(plain_policy) as url:
        page = new_page()
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("ask"))
        assert page.run("[...document.getElementById('key').options].map(one => one.value)") == ["tiny", "half"]
        page.choose_file("#cameras input", picture)
        page.run("document.getElementById('key').value = 'half'")
        page.focus("#instruction")
        page.type("pick up the red block")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("answer"))
        assert "statistics half" in page.text("#timing")


def test_a_chunk_is_shown_as_curves_on_a_phone(new_page, serve, chunk_policy, picture):
    with serve(chunk_policy) as url:
        page = new_page()
        page.resize(390, 800, dark=True)
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("ask"))
        for number in (1, 2):
            page.choose_file(f".camera:nth-child({number}) input", picture)
        page.focus("#instruction")
        page.type("pick up the red block")
        page.focus("#state")
        page.type("1 2 3")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("problem"))
        assert page.text("#problem") == "The state must be 8 numbers, separated by spaces or commas."
        page.type(" 4 5 6 7 8")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("answer"))
        points = page.run("[...document.querySelectorAll('polyline')].map(one => one.points.length)")
        assert points == [8] * 7
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.problems == []


def test_the_camera_of_the_browser_can_be_used(new_page, serve, plain_policy):
    with serve(plain_policy) as url:
        page = new_page()
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("ask"))
        page.focus(".live")
        page.press("Enter", "\r")
        page.wait_for("document.querySelector('video').videoWidth > 0")
        page.focus("#instruction")
        page.type("pick up the red block")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("answer"))
        assert page.problems == []


def test_the_page_asks_for_the_token(new_page, serve, plain_policy):
    with serve(plain_policy, token=TOKEN) as url:
        page = new_page()
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("login"))
        assert page.problems == []
        page.type("wrong")
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("problem"))
        assert page.text("#problem") == "The token is wrong. Send the token that the server was started with."
        page.run("document.getElementById('token').value = ''")
        page.type(TOKEN)
        page.press("Enter", "\r")
        page.wait_for(SHOWN.format("ask"))
        assert httpx.get(f"{url}/page/episode?seed=0").status_code == 401
        told = {"openapi.json": '"openapi": "3', "info": "tiny/plain", "metrics": "openvla_requests_"}
        for link, word in told.items():
            page.focus(f"a[href='{link}']")
            page.press("Enter", "\r")
            page.wait_for("document.getElementById('linked').open")
            assert word in page.text("#linked-text")
            page.press("Escape")
            page.wait_for("!document.getElementById('linked').open")


def test_an_episode_of_the_tabletop_is_shown_live(new_page, serve, tabletop_policy):
    with serve(tabletop_policy) as url:
        page = new_page()
        page.open(f"{url}/")
        page.wait_for(SHOWN.format("episodes"))
        page.focus("#watch")
        page.press("Enter", "\r")
        page.wait_for("/done/.test(document.getElementById('caption').innerText)")
        assert page.run("document.getElementById('scene').naturalWidth") > 0
        assert page.problems == []


def test_an_episode_without_a_session_or_an_action_says_why(serve, tabletop_policy, monkeypatch):
    def fail(batch):
        raise RuntimeError("The kernel is broken")

    with serve(tabletop_policy, max_sessions=1) as url:
        session = httpx.post(f"{url}/v1/sessions").json()["session"]
        refused = httpx.get(f"{url}/page/episode?seed=0")
        assert (refused.status_code, refused.json()["error"]) == (429, "too_many_requests")
        httpx.delete(f"{url}/v1/sessions/{session}")
        monkeypatch.setattr(tabletop_policy, "predict", fail)
        steps = [json.loads(line) for line in httpx.get(f"{url}/page/episode?seed=0").text.splitlines()]
        assert steps[-1] == {"problem": "RuntimeError: The kernel is broken"}
        assert httpx.post(f"{url}/v1/sessions").status_code == 201


def test_an_episode_is_that_of_an_evaluation(serve, tabletop_policy):
    from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, load_policy, run_episodes

    model, processor = tabletop_policy.model, tabletop_policy.processor
    (expected,) = run_episodes(load_policy(model, processor), [FIRST_UNSEEN_SEED], batch_size=1)
    with serve(tabletop_policy) as url:
        answer = httpx.get(f"{url}/page/episode", params={"seed": FIRST_UNSEEN_SEED}, timeout=60)
        sessions = httpx.get(f"{url}/metrics").text
    steps = [json.loads(line) for line in answer.text.splitlines()]
    assert [step["step"] for step in steps] == list(range(expected.steps + 1))
    assert (steps[-1]["instruction"], steps[-1]["success"]) == (expected.instruction, expected.success)
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(steps[0]["image"]))))
    assert first.shape == (224, 224, 3)
    assert "openvla_sessions 0.0" in sessions


def test_the_page_offers_no_episode_of_another_robot_and_no_other_file(serve, plain_policy):
    with serve(plain_policy) as url:
        assert httpx.get(f"{url}/page/tabletop").json() == {"is_robot": False}
        assert httpx.get(f"{url}/page/episode?seed=0").status_code == 422
        for name in ("index.html", "..%2Fpage.py", "page.py"):
            assert httpx.get(f"{url}/page/{name}").status_code == 404
        assert "script-src" not in httpx.get(f"{url}/").headers["content-security-policy"]
        assert httpx.get(f"{url}/").headers["content-security-policy"].startswith("default-src 'self'")
