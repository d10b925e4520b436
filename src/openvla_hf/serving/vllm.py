"""Serve a policy whose model runs in vLLM, in a process and a Python environment of its own.

vLLM computes the ids of the action tokens. Image processing, prompts, decoding and statistics stay with this package,
so robots get the same actions.

Shapes: A action dimensions, N action bins.
"""

import base64
import contextlib
import io
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from transformers.utils import CONFIG_NAME

from .. import auto  # noqa: F401 - makes the Auto classes know OpenVLA
from ..checkpoints.describe import CheckpointInfo, refuse_adapter
from ..checkpoints.describe import describe as describe_checkpoint
from ..checkpoints.export import export, published_config
from ..modeling.checkpoint_files import CheckpointFiles
from ..modeling.checkpoint_loading import LoadedFrom
from ..modeling.model_inputs import prepare_prompts
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.image_processing_openvla import OpenVLAImageProcessor
from ..processing.processing_openvla import OpenVLAProcessor
from .batching import RETRY_AFTER
from .errors import Busy, PredictionFailed
from .policy import Prediction, Prepared, ServedPolicy


VISION_BACKBONE = "dinosiglip-vit-so-224px"
"""Vision towers that vLLM's OpenVLA has."""
GENERATE = "/inference/v1/generate"
"""Path at which vLLM takes and returns token ids."""
SERVER_OPTIONS = ("--enable-scale-out", "--logprobs-mode", "processed_logprobs")
"""Options that add this path to vLLM, and make the probabilities those among the allowed ids."""
HEALTH = "/health"
API_KEY_VARIABLE = "VLLM_API_KEY"
REQUEST_SECONDS = 300.0  # the first request may compile
HEALTH_SECONDS = 5.0
STOP_SECONDS = 30.0
MAX_REQUESTS = 64
POLL_SECONDS = 0.2
LAST_LINES = 12
PROBABILITY_TOLERANCE = 1e-3


class VllmPolicy(ServedPolicy):
    """A policy that asks a vLLM server for the ids of action tokens.

    Args:
        model: The model on the device "meta". Its config and statistics are used.
        processor: Its processor.
        client: Client of the vLLM server.
        model_id: Folder or Hub id, for `describe`.
        options: Other arguments of `ServedPolicy`.
    """

    engine = "vllm"

    def __init__(
        self,
        model: OpenVLAForActionPrediction,
        processor: OpenVLAProcessor,
        client: httpx.Client,
        model_id: str = "",
        **options: Any,
    ):
        super().__init__(model, processor, model_id, **options)
        self.client = client
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="vllm")

    @property
    def uses_drafts(self) -> bool:
        """Whether the last action's ids make the next prediction cheaper: not in vLLM."""
        return False

    def describe_arithmetic(self) -> dict[str, str | None]:
        """Leave open what vLLM computes on and in."""
        return {"device": None, "dtype": None}

    def check_health(self) -> None:
        """Raise `Busy` if vLLM does not answer or has failed."""
        try:
            response = self.client.get(HEALTH, timeout=HEALTH_SECONDS)
        except httpx.TransportError as error:
            raise _no_answer(error) from error
        if not response.is_success:
            raise Busy(
                f"vLLM has failed: its health check answers with status {response.status_code}. Restart vLLM, or this "
                "server if it started vLLM.",
                RETRY_AFTER,
            )

    def predict(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        """Predict observations, which vLLM joins into batches.

        Raises:
            ValueError: vLLM rejects an observation, or its output is not finite.
            ServingError: vLLM does not answer, or fails.
        """
        started = time.perf_counter()
        generated = list(self._threads.map(self._generate, prepared))
        seconds = time.perf_counter() - started
        return [self._decode(one, *ids, seconds) for one, ids in zip(prepared, generated, strict=True)]

    def _generate(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (A,) of one observation's action and the probabilities (A, N) of the bins."""
        tokenizer = self.model.action_tokenizer
        dim = self.model.get_action_dim(prepared.unnorm_key)
        body = {
            "token_ids": prompt_ids(self.model.config, prepared),
            "content_parts": [{"type": "image_url", "url": image_url(self.processor.image_processor, prepared)}],
            "sampling_params": {
                "temperature": 0.0,
                "max_tokens": dim,
                "ignore_eos": True,
                "detokenize": False,
                "allowed_token_ids": list(range(tokenizer.first_id, tokenizer.vocab_end)),
                "logprobs": tokenizer.n_bins,
            },
        }
        answer = self._post(body)["choices"][0]
        token_ids = np.array(answer["token_ids"], np.int64)
        if token_ids.shape != (dim,):
            raise PredictionFailed(f"vLLM returned {len(token_ids)} of {dim} action tokens.")
        probabilities = np.zeros((dim, tokenizer.n_bins), np.float32)
        for step, token in enumerate(answer["logprobs"]["content"]):
            for one in token["top_logprobs"]:
                bin_index = tokenizer.vocab_end - 1 - one["token_id"]
                if 0 <= bin_index < tokenizer.n_bins:
                    probabilities[step, bin_index] = np.exp(one["logprob"])
        # NaN fails this check too.
        if not (np.abs(probabilities.sum(-1) - 1) < PROBABILITY_TOLERANCE).all():
            raise ValueError(
                "The probabilities of the action tokens do not sum to 1. Start vLLM with `--logprobs-mode "
                "processed_logprobs`. If vLLM has this option already, check the weights for NaN and infinity."
            )
        return token_ids, probabilities

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request to vLLM and return its answer."""
        try:
            response = self.client.post(GENERATE, json=body)
        except httpx.TransportError as error:
            raise _no_answer(error) from error
        if response.is_success:
            return response.json()
        reason = f"vLLM answered with status {response.status_code}: {response.text[:500]}"
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise Busy(reason, RETRY_AFTER)
        if response.is_client_error:
            raise ValueError(reason)
        raise PredictionFailed(reason)

    def _decode(
        self, prepared: Prepared, token_ids: np.ndarray, probabilities: np.ndarray, seconds: float
    ) -> Prediction:
        log = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
        return Prediction(
            actions=self.model.decode_actions(token_ids, prepared.unnorm_key)[None],
            unnorm_key=prepared.unnorm_key,
            token_ids=token_ids[None],
            probabilities=probabilities[None],
            entropy=-(probabilities * log).sum(-1)[None],
            text=None,
            forward_passes=len(token_ids),
            preprocess_seconds=prepared.seconds,
            model_seconds=seconds,
        )


def _no_answer(error: httpx.TransportError) -> Busy:
    return Busy(f"vLLM does not answer ({str(error) or type(error).__name__}).", RETRY_AFTER)


def prompt_ids(config: Any, prepared: Prepared) -> list[int]:
    """Return the ids of a prompt as vLLM expects them: with the suffix, without placeholders and padding."""
    ids, mask = prepare_prompts(config, prepared.inputs["input_ids"], prepared.inputs["attention_mask"])
    return [token for token in ids[mask == 1].tolist() if token != config.image_token_id]


def image_url(image_processor: OpenVLAImageProcessor, prepared: Prepared) -> str:
    """Return the resized and cropped image as a data URL. vLLM's resizing does not change an image of this size."""
    mean, std = (np.array(one[0])[:, None, None] for one in (image_processor.image_mean, image_processor.image_std))
    pixels = prepared.inputs["pixel_values"][0, :3].numpy()
    levels = np.rint((pixels * std + mean) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def load_without_weights(
    model_id: str, revision: str | None = None
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor, CheckpointInfo]:
    """Load everything of a checkpoint but its weights: the model on the device "meta", the processor, the description.

    Raises:
        ValueError: vLLM can't run the checkpoint.
        OSError: The checkpoint can't be found or read.
    """
    refuse_adapter(model_id, revision=revision)
    found = describe_checkpoint(model_id, revision=revision)
    if found.quantization is not None:
        raise ValueError(
            f"{model_id} is quantised ({found.quantization}), but vLLM only runs OpenVLA in 16 or 32 bits. Serve the "
            "checkpoint that it was made from, or serve it without vLLM."
        )
    shared = {"revision": revision or "main"}
    config = AutoConfig.from_pretrained(model_id, **shared)
    if found.oft is not None or config.reasoning:
        raise ValueError(
            f"vLLM's OpenVLA only predicts one action from one image and an instruction, but {model_id} is an "
            "OpenVLA-OFT or a reasoning checkpoint: serve it without vLLM."
        )
    config.norm_stats = found.statistics
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    model.loaded_from = LoadedFrom.file(model_id, CheckpointFiles.locate(model_id, **shared).find(CONFIG_NAME))
    processor = AutoProcessor.from_pretrained(model_id, **shared)
    check_fit(model, processor, model_id)
    return model.eval(), processor, found


def check_fit(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, model_id: str) -> None:
    """Check that vLLM's OpenVLA computes the same as this model.

    Raises:
        ValueError: The language model, the vision towers, the prompt or the normalisation of pixels differ.
    """
    with _no_warnings_of_export():
        backbone = published_config(model, processor)["vision_backbone_id"]
    if backbone != VISION_BACKBONE:
        raise ValueError(
            f"vLLM's OpenVLA only has the vision towers {VISION_BACKBONE!r}, but {model_id} has {backbone!r}: serve "
            "it without vLLM."
        )
    ours, fixed = processor.image_processor, OpenVLAImageProcessor()
    for name in ("image_mean", "image_std"):
        if getattr(ours, name) != getattr(fixed, name):
            raise ValueError(
                f"vLLM's OpenVLA only normalises pixels with `{name}={getattr(fixed, name)}`, but {model_id} has "
                f"{getattr(ours, name)}: serve it without vLLM."
            )


@contextlib.contextmanager
def open_policy(
    model_id: str,
    *,
    vllm_python: str | None = None,
    vllm_url: str | None = None,
    vllm_args: Sequence[str] = (),
    dtype: str = "auto",
    revision: str | None = None,
    **options: Any,
) -> Iterator[VllmPolicy]:
    """Open a policy whose model runs in vLLM, and stop vLLM at the end if it was started here.

    If the vLLM server needs an API key, the variable `VLLM_API_KEY` must contain it.

    Args:
        model_id: Folder or Hub id of a checkpoint. Unless it is in the published layout, vLLM reads an export of it
            in a temporary folder.
        vllm_python: Python of an environment with vLLM, which is started in a process of its own.
        vllm_url: Address of a vLLM server that is already running, in place of `vllm_python`.
        vllm_args: Further arguments of the vLLM server that is started.
        dtype: Data type of the weights in the vLLM server that is started; "auto" for the checkpoint's.
        revision: Branch, tag or commit of a Hub id.
        options: Arguments of `ServedPolicy`.

    Raises:
        ValueError: vLLM can't run the checkpoint, or an argument does not fit.
        OSError: The checkpoint can't be read, or vLLM does not start.
    """
    if (vllm_python is None) == (vllm_url is None):
        raise ValueError(
            "Give either `vllm_python`, the Python of an environment with vLLM, or `vllm_url`, the address of a vLLM "
            "server that is already running."
        )
    if vllm_python is not None and shutil.which(vllm_python) is None:
        raise ValueError(
            f"`vllm_python` must be the Python of an environment with vLLM, but cannot run {vllm_python!r}."
        )
    if vllm_url is not None and not vllm_url.startswith(("http://", "https://")):
        raise ValueError(f"`vllm_url` must start with http:// or https://, got {vllm_url!r}.")
    if vllm_url is not None and (vllm_args or dtype != "auto"):
        name = "vllm_args" if vllm_args else "dtype"
        raise ValueError(f"`{name}` has no effect on a vLLM server that is already running: leave it out.")
    model, processor, found = load_without_weights(model_id, revision)
    with TemporaryDirectory(prefix="openvla-hf-") as folder, contextlib.ExitStack() as stack:
        # Other users of the machine have no access to a socket in this folder.
        address = Path(folder, "vllm.sock")
        client = stack.enter_context(_make_client(vllm_url, address))
        policy = VllmPolicy(model, processor, client, model_id, **options)
        if vllm_python is not None:
            source = [model_id, *(["--revision", revision] if revision else [])]
            if found.layout != "published":
                with _no_warnings_of_export():
                    source = [str(export(model_id, Path(folder, "checkpoint"), revision=revision))]
            command = [
                *(vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", *source, "--uds", str(address)),
                *("--dtype", found.dtype if dtype == "auto" else dtype, *SERVER_OPTIONS),
                *("--max-logprobs", str(model.config.n_action_bins)),
                # Caches are useless, since no two frames of a camera are equal.
                *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
                *vllm_args,
            ]
            stack.enter_context(running_vllm(command, client, Path(folder)))
        yield policy


@contextlib.contextmanager
def _no_warnings_of_export() -> Iterator[None]:
    """Hide warnings of image processing that the published layout does not store: vLLM gets processed images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The published layout does not store")
        yield


def _make_client(url: str | None, address: Path) -> httpx.Client:
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {} if not key else {"Authorization": f"Bearer {key}"}
    if url is None:
        transport = httpx.HTTPTransport(uds=str(address))
        return httpx.Client(base_url="http://vllm", transport=transport, headers=headers, timeout=REQUEST_SECONDS)
    return httpx.Client(base_url=url, headers=headers, timeout=REQUEST_SECONDS)


@contextlib.contextmanager
def running_vllm(command: Sequence[str], client: httpx.Client, folder: Path) -> Iterator[None]:
    """Run a vLLM server, and yield once it takes requests. Its log and its temporary files are in `folder`.

    Raises:
        OSError: vLLM ends before it takes requests.
    """
    log = folder / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which stops vLLM after its last answer
            # vLLM leaves files in TMPDIR.
            env={"VLLM_NO_USAGE_STATS": "1"} | os.environ | {"TMPDIR": str(folder)},
        )
    try:
        while not _is_healthy(client):
            if process.poll() is not None:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
                raise OSError("\n".join([f"vLLM ended with status {process.returncode}. Its last lines:", *lines]))
            time.sleep(POLL_SECONDS)
        yield
    finally:
        _stop(process)


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get(HEALTH).is_success
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a vLLM server and its workers, which are in its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


__all__ = ["VllmPolicy", "load_without_weights", "open_policy"]
