"""vLLM as the engine: what it is asked, how its answers become actions, what it can't run, and vLLM itself."""

import base64
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image, ImageFilter
from running import running_server
from transformers import AutoModel

from openvla_hf.cli import main
from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.serving import Client
from openvla_hf.serving.errors import Busy, PredictionFailed
from openvla_hf.serving.policy import Observation, ServedPolicy
from openvla_hf.serving.vllm import VllmPolicy, check_fit, load_without_weights, running_vllm
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor, tiny_tokenizer, write_tiny_oft


ENVIRONMENT = Path(__file__).parent / "vllm_environment"
ACTION_IDS = range(31744, 32000)
HALF_STATS = BRIDGE_LIKE_STATS | {name: [value / 2 for value in BRIDGE_LIKE_STATS[name]] for name in ("q01", "q99")}


def real_towers(backbone="dinosiglip-vit-so-224px"):
    """A config with published towers and ids, and with a small language model."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return OpenVLAConfig(
        vision_backbone_id=backbone,
        text_config=sizes | heads,
        norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS}, "half": {"action": HALF_STATS}},
    )


def without_weights(config):
    with torch.device("meta"):
        return AutoModel.from_config(config).eval()


def frame(seed, height=224, width=224):
    """A picture with soft shapes, since noise makes all pictures look alike to the towers."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(4 * seed))


class StandIn:
    """Answers as vLLM does, with ids and probabilities of its own."""

    def __init__(self):
        self.ids = [31744, 31800, 31872, 31900, 31950, 31998, 31999]
        self.chosen = 0.4
        self.status = 200
        self.bodies = []
        self.app = FastAPI()
        self.app.post("/inference/v1/generate")(self.generate)
        self.app.get("/health")(self.health)

    async def health(self):
        return JSONResponse({}, self.status)

    async def generate(self, request: Request):
        self.bodies.append(await request.json())
        content = []
        for token_id in self.ids:
            rest = [{"token_id": other, "logprob": np.log(0.6 / 255)} for other in ACTION_IDS if other != token_id]
            content.append({"top_logprobs": [{"token_id": token_id, "logprob": np.log(self.chosen)}, *rest]})
        choice = {"token_ids": self.ids, "logprobs": {"content": content}}
        return JSONResponse({"choices": [choice]}, self.status)


@pytest.fixture(scope="module")
def model():
    return without_weights(real_towers())


@pytest.fixture
def stand_in():
    return StandIn()


@pytest.fixture
def policy(model, stand_in):
    """The policy in front of the stand-in."""
    processor = tiny_processor(config=model.config)
    with running_server(stand_in.app) as url, httpx.Client(base_url=url) as client:
        yield VllmPolicy(model, processor, client, "tiny/vllm", unnorm_key="tiny")


def prepare(policy, seed=1, **fields):
    return policy.prepare(Observation({"image": frame(seed, 100, 130)}, "pick up the red block", **fields))


def test_vllm_gets_the_prompt_with_its_suffix_and_the_processed_image(policy, stand_in):
    policy.predict([prepare(policy)])
    (body,) = stand_in.bodies
    prompt = policy.processor(frame(1), instruction="pick up the red block")["input_ids"][0]
    text = prompt[prompt != policy.model.config.image_token_id].tolist()
    assert body["token_ids"] == [*text, 29871]
    assert body["sampling_params"]["allowed_token_ids"] == [*ACTION_IDS]
    (part,) = body["content_parts"]
    sent = Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2])))
    expected = policy.processor.image_processor.resize(frame(1, 100, 130))
    assert sent.size == (224, 224)
    assert np.array_equal(sent, expected)


def test_ids_from_vllm_become_actions_in_the_units_of_each_robots_statistics(policy, stand_in, model):
    keys = [None, "half", "tiny"]
    predictions = policy.predict([prepare(policy, seed, unnorm_key=key) for seed, key in enumerate(keys)])
    for prediction, key in zip(predictions, ["tiny", "half", "tiny"], strict=True):
        assert prediction.unnorm_key == key
        assert np.array_equal(prediction.actions[0], model.decode_actions(np.array(stand_in.ids), key))
        assert prediction.token_ids.tolist() == [stand_in.ids]
        assert prediction.probabilities.shape == (1, 7, 256)
        bins = ACTION_IDS[-1] - np.array(stand_in.ids)
        assert prediction.probabilities[0].argmax(-1).tolist() == bins.tolist()
        assert prediction.entropy == pytest.approx(-0.4 * np.log(0.4) - 0.6 * np.log(0.6 / 255), rel=1e-5)


def test_probabilities_of_other_tokens_too_are_an_error(policy, stand_in):
    stand_in.chosen = 0.1
    with pytest.raises(ValueError, match=r"do not sum to 1\. Start vLLM with `--logprobs-mode processed_logprobs`"):
        policy.predict([prepare(policy)])


def test_an_action_that_ends_early_is_an_error(policy, stand_in):
    stand_in.ids = stand_in.ids[:5]
    with pytest.raises(PredictionFailed, match="returned 5 of 7 action tokens"):
        policy.predict([prepare(policy)])


@pytest.mark.parametrize(
    ("status", "error"), [(400, ValueError), (403, ValueError), (500, PredictionFailed), (503, Busy)]
)
def test_vllms_errors_say_whose_fault_it_is(policy, stand_in, status, error):
    stand_in.status = status
    with pytest.raises(error, match=f"vLLM answered with status {status}: "):
        policy.predict([prepare(policy)])


def test_robots_are_told_to_try_again_while_vllm_is_gone(model):
    with httpx.Client(base_url="http://127.0.0.1:1") as client:
        policy = VllmPolicy(model, tiny_processor(config=model.config), client, unnorm_key="tiny")
        with pytest.raises(Busy, match="vLLM does not answer"):
            policy.predict([prepare(policy)])


def test_a_client_acts_and_reads_which_engine_runs(policy, serve):
    with serve(policy) as url, Client(url) as client:
        action = client.predict_action(frame(1, 100, 130), "pick up the red block")
        assert [client.info[name] for name in ("engine", "device", "dtype")] == ["vllm", None, None]
    np.testing.assert_array_equal(action, policy.predict([prepare(policy)])[0].actions[0])


def test_the_server_is_not_ready_while_vllm_has_failed(policy, stand_in, serve):
    with serve(policy) as url, httpx.Client(base_url=url) as client:
        assert client.get("/ready").status_code == 200
        stand_in.status = 503
        failed = client.get("/ready")
        policy.client = httpx.Client(base_url="http://127.0.0.1:1")
        gone = client.get("/ready")
        assert client.get("/health").status_code == 200
    reasons = ("vLLM has failed: its health check answers with status 503. Restart vLLM", "vLLM does not answer (")
    for answer, reason in zip((failed, gone), reasons, strict=True):
        assert (answer.status_code, answer.json()["error"]) == (503, "busy")
        assert answer.json()["reason"].startswith(reason)


# What vLLM can't run


def test_other_towers_are_refused():
    config = real_towers("siglip-vit-so400m")
    with pytest.raises(ValueError, match="only has the vision towers 'dinosiglip-vit-so-224px', but lab/siglip has"):
        check_fit(without_weights(config), tiny_processor(config=config), "lab/siglip")


def test_other_normalisation_of_pixels_is_refused(model):
    processor = tiny_processor(config=model.config)
    processor.image_processor.image_std = [[0.5] * 3, [0.5] * 3]
    with pytest.raises(ValueError, match="only normalises pixels with `image_std="):
        check_fit(model, processor, "lab/half")


def test_oft_checkpoints_adapters_and_quantised_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only predicts one action from one image and an instruction"):
        load_without_weights(str(write_tiny_oft(tmp_path / "oft")))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it first with `openvla-hf merge"):
        load_without_weights(str(adapter))
    quantised = tmp_path / "quantised"
    config = tiny_config()
    AutoModel.from_config(config).save_pretrained(quantised)
    stored = json.loads((quantised / "config.json").read_text())
    stored["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    (quantised / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"is quantised .* Serve the checkpoint that it was made from"):
        load_without_weights(str(quantised))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--engine", "vllm", "--device", "cpu"], "--device has no effect with --engine vllm"),
        (["--vllm-url", "http://127.0.0.1:1"], "--vllm-url has no effect with --engine transformers"),
        (["--engine", "vllm"], "Give either --vllm-python"),
        (["--engine", "vllm", "--vllm-url", "http://127.0.0.1:1", "--dtype", "float16"], "--dtype has no effect on"),
        (["--engine", "vllm", "--vllm-python", "no-python"], "--vllm-python must be the Python of an environment"),
        (["--engine", "vllm", "--vllm-url", "127.0.0.1:1"], "--vllm-url must start with http:// or https://"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(options, reason, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *handler: None)  # of the process that runs the tests
    assert main(["serve", "--port", "0", *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_vllm_that_does_not_start_is_shown_with_its_last_lines(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('No GPU found.')"]
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "vllm.sock")), base_url="http://vllm") as client,
        pytest.raises(OSError, match=r"vLLM ended with status 1\. Its last lines:\nNo GPU found\."),
        running_vllm(command, client, tmp_path),
    ):
        pass


# vLLM itself


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with the real towers, a small language model and random weights, in bfloat16."""
    folder = tmp_path_factory.mktemp("vllm") / "checkpoint"
    unused = [f"<unused_{index}>" for index in range(ACTION_IDS[-1] + 1 - tiny_tokenizer().pad_token_id)]
    model = without_weights(real_towers()).to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 if "vision_backbone" in name else 0.1)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(folder)
    tiny_processor(tiny_tokenizer(phrases=unused), model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def short_folder():
    """A folder for sockets, whose paths have at most 107 characters."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def processes_with(text):
    """Command lines of the running processes that contain a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # the process has ended
            continue
    return [line for line in found if text in line]


@pytest.mark.slow
def test_a_policy_served_by_vllm_chooses_the_same_tokens_and_leaves_no_process(vllm, checkpoint, short_folder):
    command = [sys.executable, "-m", "openvla_hf.cli", "serve", str(checkpoint), "--engine", "vllm"]
    command += ["--vllm-python", vllm, "--vllm-args=--enforce-eager --max-num-seqs 4", "--dtype", "float32"]
    command += ["--unnorm-key", "tiny", "--port", "0", "--json"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ENVIRONMENT), *sys.path[1:]]),
        "TMPDIR": str(short_folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    policy = ServedPolicy.load(str(checkpoint), dtype="float32", unnorm_key="tiny")
    observations = [
        Observation({"image": frame(seed, *size)}, instruction, unnorm_key=key)
        for seed, size, key in (
            (1, (224, 224), None),
            (3, (256, 320), "half"),
            (6, (480, 640), "tiny"),
            (9, (300, 200), "half"),
        )
        for instruction in ("pick up the red block", "open the drawer", "put the spoon on the towel, then stop")
    ]
    expected = [policy.predict([policy.prepare(one)])[0] for one in observations]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["engine"] == "vllm"
        with ThreadPoolExecutor(len(observations)) as threads:
            answers = list(threads.map(lambda one: act(ready["url"], one), observations))
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert len({tuple(one.token_ids[0]) for one in expected}) > 3
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer["details"]["token_ids"] == prediction.token_ids.tolist()
        assert answer["actions"] == prediction.actions.tolist()
        np.testing.assert_allclose(answer["details"]["bin_probabilities"], prediction.probabilities, atol=1e-5)
    assert max(answer["batch_size"] for answer in answers) > 1
    assert processes_with(str(short_folder)) == []
    assert list(short_folder.iterdir()) == []


def act(url, observation):
    """Ask a server for the action of an observation, with a lossless image."""
    buffer = io.BytesIO()
    observation.images["image"].save(buffer, "PNG")
    fields = {"instruction": observation.instruction, "details": "all"}
    if observation.unnorm_key:
        fields["unnorm_key"] = observation.unnorm_key
    body = fields | {"images": {"image": base64.b64encode(buffer.getvalue()).decode()}}
    response = httpx.post(f"{url}/v1/act", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()
