"""Measure how long an action and its parts take, and how far they are from the limits of the device.

Shapes: B batch, P image patches, T tokens of the prompt (placeholders included), A action dimensions.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import LogitsProcessorList

from ..modeling.action_decoding import ActionIdsOnly, action_pass
from ..modeling.action_tokenizer import normalize_state, resolve_key
from ..modeling.model_inputs import prepare_prompts
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from .latency_floor import Floor
from .random_models import INSTRUCTION


# Calls of each variant that are not counted.
WARM_UP = 2
# Sizes for measuring the device's own speed: too large for its caches, and quick to run.
BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
MATMUL_WIDTH = {"cpu": 1024, "cuda": 8192}


# The device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure_bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the bytes per second that the device reads: the best of copies and products with a vector."""
    source = torch.ones(BANDWIDTH_BYTES[device.type] // dtype.itemsize // 4096, 4096, dtype=dtype, device=device)
    target, vector = torch.empty_like(source), torch.ones(4096, dtype=dtype, device=device)
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(6))
    multiplied = min(seconds(lambda: torch.mv(source, vector), device) for _ in range(6))
    return source.nbytes / min(copied / 2, multiplied)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second in the product of two square matrices."""
    width = MATMUL_WIDTH[device.type]
    matrix = torch.ones(width, width, dtype=dtype, device=device)
    return 2 * width**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(6))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the peak of the bytes that a call adds to those in use; `None` if they cannot be counted."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None

    def resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


# Timing


@dataclass
class BatchLatency:
    """Figures for one batch size, in seconds.

    Attributes:
        batch_size: Observations in a call.
        prompt_tokens: Tokens of the prompt, image placeholders included.
        parts: Medians of processor, vision, prefill and decode of `predict_action`, or of processor, vision and chunk
            (the rest) with parallel decoding.
        floor: `{part or variant: least time}`, see `Floor`.
        timings: `{variant: {"median", "p95", "hz", "speedup"}}`; `hz` counts the actions of all rows and chunks,
            and `speedup` is its ratio to the `hz` of plain `generate`, if the model can generate.
        forward_passes: `{variant: passes of the language model in a call}`.
        actions_per_call: `{variant: actions of each row in a call}`; more than one is a chunk.
        passes_per_action: `{variant: passes of the language model for each action}`.
        same_tokens: Whether every variant of decoding token by token gives the tokens of `generate` restricted to the
            action ids; `None` if the model decodes in parallel.
        peak_bytes: Bytes that one `predict_action` needs beyond the weights; `None` if they cannot be counted.
    """

    batch_size: int
    prompt_tokens: int
    parts: dict[str, float]
    floor: dict[str, float]
    timings: dict[str, dict[str, float]]
    forward_passes: dict[str, int]
    actions_per_call: dict[str, int]
    passes_per_action: dict[str, float]
    same_tokens: bool | None
    peak_bytes: int | None


@dataclass
class Latency:
    """The result of `measure_latency`.

    Attributes:
        device: Name of the device.
        threads: CPU threads that PyTorch uses.
        dtype: Type of the weights.
        versions: Versions of torch and transformers.
        parameters: Number of weights.
        weight_bytes: Bytes of all weights.
        bandwidth: Bytes per second that the device reads, measured.
        matmul: Floating-point operations per second, measured.
        repeats: Number of counted calls of each variant.
        batches: Figures for each batch size.
    """

    device: str
    threads: int
    dtype: str
    versions: dict[str, str]
    parameters: int
    weight_bytes: int
    bandwidth: float
    matmul: float
    repeats: int
    batches: list[BatchLatency] = field(default_factory=list)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # The instruction set ("AVX2", "AVX512") says more about speed than the CPU's name.
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"


@torch.no_grad()
def measure_latency(
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    *,
    unnorm_key: str | None = None,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 20,
    compile_passes: bool = False,
    chunk_models: Mapping[str, OpenVLAForActionPrediction] | None = None,
    instruction: str = INSTRUCTION,
    progress: Callable[[str], None] = lambda what: None,
) -> Latency:
    """Time `predict_action` with and without a draft, and `generate`; the variants take turns.

    A model with parallel decoding has only `predict_action`.

    Args:
        model: A policy on the device to measure.
        processor: Its processor.
        unnorm_key: Name of the action statistics whose dimensions are predicted, if the model has several.
        batch_sizes: Observations in a call.
        repeats: Counted calls of each variant.
        compile_passes: Whether to time `compile_for_actions` too.
        chunk_models: `{variant: model with parallel decoding}` to compare with the model, for the same observations.
        instruction: The instruction for each observation.
        progress: Called with the name of each step before it starts.

    Raises:
        ValueError: `compile_passes` is set for a model with parallel decoding.
    """
    if compile_passes and model.config.is_parallel:
        raise ValueError(
            "Compiled passes are for decoding an action token by token, but this model decodes a chunk in one pass: "
            "measure it without compiling."
        )
    device, dtype = model.device, model.dtype
    progress("device")
    weights = list(model.parameters())
    result = Latency(
        device=device_name(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.nbytes for weight in weights),
        bandwidth=measure_bandwidth(device, dtype),
        matmul=measure_matmul(device, dtype),
        repeats=repeats,
    )
    for batch_size in batch_sizes:
        calls, *of_chunks = (
            _Calls(one, processor, unnorm_key, batch_size, instruction)
            for one in (model, *(chunk_models or {}).values())
        )
        chunks = dict(zip(chunk_models or {}, of_chunks, strict=True))
        result.batches.append(_measure_batch(calls, chunks, result, compile_passes, progress))
    return result


def prepare_inputs(model: OpenVLAForActionPrediction, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Lay out a processor's output for `generate`, on the device and in the dtype of the model."""
    input_ids, mask = prepare_prompts(model.config, inputs["input_ids"], inputs["attention_mask"])
    return {
        "input_ids": input_ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "pixel_values": inputs["pixel_values"].to(model.device, model.dtype),
    }


def generate(
    model: OpenVLAForActionPrediction, inputs: Mapping[str, torch.Tensor], steps: int, **options: Any
) -> torch.Tensor:
    """Generate `steps` tokens greedily from the output of `prepare_inputs`."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=steps, min_new_tokens=steps, **options)


def generate_action_ids(
    model: OpenVLAForActionPrediction, inputs: Mapping[str, torch.Tensor], steps: int
) -> np.ndarray:
    """Generate action ids (B, steps) greedily from the output of `prepare_inputs`."""
    action_ids = model.action_tokenizer
    only_actions = LogitsProcessorList([ActionIdsOnly(action_ids.first_id, action_ids.vocab_end)])
    return generate(model, inputs, steps, logits_processor=only_actions)[:, -steps:].cpu().numpy()


class _Calls:
    """The calls that are timed for one batch of random images with the same instruction."""

    def __init__(
        self,
        model: OpenVLAForActionPrediction,
        processor: OpenVLAProcessor,
        unnorm_key: str | None,
        batch_size: int,
        instruction: str,
    ):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.unnorm_key, self.stats = unnorm_key, model.get_action_stats(unnorm_key)
        self.steps = model.get_action_dim(unnorm_key)
        shape = batch_size, model.config.num_images, 256, 256, 3
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self.images = [list(cameras) if len(cameras) > 1 else cameras[0] for cameras in images]
        self.instructions = [instruction] * batch_size
        state_dim = model.config.proprio_dim
        self.state = None if state_dim is None else np.zeros((batch_size, state_dim))
        self.inputs = prepare_inputs(model, self.process())

    def process(self) -> Any:
        return self.processor(self.images, instruction=self.instructions, state=self.state)

    def see(self) -> torch.Tensor:
        text = None
        if self.model.config.use_film:
            text = torch.zeros(self.batch_size, self.model.config.text_config.hidden_size, device=self.model.device)
        return self.model.get_image_features(self.inputs["pixel_values"], text)

    def prompts(self) -> dict[str, torch.Tensor]:
        """Return the inputs of `generate`, which takes a normalised state."""
        if self.state is None:
            return self.inputs
        config = self.model.config
        stats = (config.norm_stats or {})[resolve_key(config.norm_stats, self.unnorm_key)]["proprio"]
        proprio = torch.from_numpy(normalize_state(self.state, stats, config.action_normalization))
        return self.inputs | {"proprio": proprio.to(self.model.device, self.model.dtype)}

    def generate(self) -> torch.Tensor:
        return generate(self.model, self.prompts(), self.steps)

    def predict(self, **options: Any) -> Any:
        given = {"stats": self.stats, "unnorm_key": self.unnorm_key, "state": self.state} | options
        return self.model.predict_action(**self.inputs, **given)

    def floor(self, passes: int, bandwidth: float, matmul: float) -> dict[str, float]:
        least = Floor(self.model, self.batch_size, self.inputs["input_ids"].shape[1], bandwidth, matmul)
        return least.chunk(passes) if self.model.config.is_parallel else least.token_by_token(self.steps)

    def predict_first_dimension(self) -> Any:
        return self.predict(
            stats={name: values[:1] for name, values in self.stats.items() if isinstance(values, list)}
        )

    def compile(self) -> Callable[..., Any]:
        """Compile the passes, and return `predict` with them, which returns `None` if the model falls back."""
        model = self.model
        plain = model.action_pass, model.action_caches
        model.compile_for_actions()
        compiled = model.action_pass, model.action_caches
        model.action_pass, model.action_caches = plain

        def predict_compiled(**options: Any) -> Any:
            model.action_pass, model.action_caches = compiled
            prediction = self.predict(**options)
            fell_back = model.action_pass is action_pass
            model.action_pass, model.action_caches = plain
            return None if fell_back else prediction

        return predict_compiled


def _measure_batch(
    calls: _Calls,
    chunks: Mapping[str, _Calls],
    result: Latency,
    compile_passes: bool,
    progress: Callable[[str], None],
) -> BatchLatency:
    def tell(what: str) -> None:
        progress(f"batch of {calls.batch_size}: {what}")

    device = calls.model.device
    tell("memory and tokens")
    peak_bytes = peak_memory(calls.predict, device)
    variants: dict[str, Callable[..., Any]] = {"processor": calls.process, "vision": calls.see}
    predictions: dict[str, Callable[..., Any]] = {"predict_action": calls.predict}
    if not calls.model.config.is_parallel:
        variants |= {"first token": calls.predict_first_dimension, "generate": calls.generate}
        predictions |= _drafted_and_compiled(calls, compile_passes, tell)
    predictions |= {name: chunk.predict for name, chunk in chunks.items()}
    details = {name: predict(return_details=True) for name, predict in predictions.items()}
    details = {name: prediction for name, prediction in details.items() if prediction is not None}

    timed = variants | {name: predictions[name] for name in details}
    times = _take_turns(timed, result.repeats, device, tell)
    passes = {name: prediction.forward_passes for name, prediction in details.items()}
    actions = {name: 1 if one.actions.ndim == 2 else one.actions.shape[1] for name, one in details.items()}
    least = calls.floor(passes["predict_action"], result.bandwidth, result.matmul)
    for name, chunk in chunks.items():
        least[name] = chunk.floor(passes[name], result.bandwidth, result.matmul)["predict_action"]
    same_tokens = None
    if not calls.model.config.is_parallel:
        generated = generate_action_ids(calls.model, calls.prompts(), calls.steps)
        same_tokens = all(np.array_equal(details[name].token_ids, generated) for name in details if name not in chunks)
    return BatchLatency(
        batch_size=calls.batch_size,
        prompt_tokens=calls.inputs["input_ids"].shape[1],
        parts=_parts(times),
        floor=least,
        timings=_timings(times, actions, calls.batch_size),
        forward_passes=passes,
        actions_per_call=actions,
        passes_per_action={name: passes[name] / actions[name] for name in passes},
        same_tokens=same_tokens,
        peak_bytes=peak_bytes,
    )


def _drafted_and_compiled(
    calls: _Calls, compile_passes: bool, tell: Callable[[str], None]
) -> dict[str, Callable[..., Any]]:
    """Make the calls that predict an action with a draft, and those with compiled passes."""
    draft = calls.predict(return_details=True).token_ids
    predictions: dict[str, Callable[..., Any]] = {"accepted draft": partial(calls.predict, draft_token_ids=draft)}
    if compile_passes:
        tell("compiling")
        predict_compiled = calls.compile()
        predictions["compiled"] = predict_compiled
        predictions["compiled, accepted draft"] = partial(predict_compiled, draft_token_ids=draft)
    return predictions


def _take_turns(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """Time all variants in turn, and return the seconds of each, without those of the warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-WARM_UP, repeats):
        tell(f"repeat {max(repeat, 0) + 1} of {repeats}")
        for name, call in variants.items():
            times[name].append(seconds(call, device))
    return {name: values[WARM_UP:] for name, values in times.items()}


def _parts(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Divide the median time of a call into its parts."""
    median = {name: float(np.median(values)) for name, values in times.items()}
    seen = {"processor": median["processor"], "vision": median["vision"]}
    if "first token" not in median:
        return seen | {"chunk": median["predict_action"] - median["vision"]}
    return seen | {
        "prefill": median["first token"] - median["vision"],
        "decode": median["predict_action"] - median["first token"],
    }


def _timings(
    times: Mapping[str, Sequence[float]], actions: Mapping[str, int], batch_size: int
) -> dict[str, dict[str, float]]:
    generated = {"generate": 1} if "generate" in times else {}
    timings = {}
    for name, count in (generated | dict(actions)).items():
        median = float(np.median(times[name]))
        rate = batch_size * count / median
        timings[name] = {"median": median, "p95": float(np.percentile(times[name], 95)), "hz": rate}
        if generated:
            timings[name]["speedup"] = rate / timings["generate"]["hz"]
    return timings


def latency_tables(result: Latency) -> list[Table]:
    """Make a table of the device and one for each batch size."""

    def ms(value: float) -> str:
        return f"{1e3 * value:.1f}"

    tables = []
    for batch in result.batches:
        table = Table(title=f"{batch.prompt_tokens} tokens, batch of {batch.batch_size}, ms per call")
        if batch.same_tokens is not None:
            table.caption = "same tokens as generate" if batch.same_tokens else "tokens differ from generate's"
        for column in ("", "median", "p95", "actions/s", "x generate", "passes/action", "floor", "x floor"):
            table.add_column(column, justify="right" if column else "left")
        for name, timing in batch.timings.items():
            usual = batch.floor["accepted draft" if "draft" in name else "predict_action"]
            least = batch.floor.get(name, usual)
            speedup = f"{timing['speedup']:.2f}" if "speedup" in timing else ""
            passes = f"{batch.passes_per_action[name]:g}" if name in batch.passes_per_action else ""
            over = f"{timing['median'] / least:.2f}"
            rates = f"{timing['hz']:.1f}", speedup, passes
            table.add_row(name, ms(timing["median"]), ms(timing["p95"]), *rates, ms(least), over)
        table.add_section()
        for name, value in batch.parts.items():
            least = batch.floor.get(name, 0.0)
            against_floor = (ms(least), f"{value / least:.2f}") if least else ()
            table.add_row(f"  {name}", ms(value), "", "", "", "", *against_floor)
        if batch.peak_bytes is not None:
            table.add_row("memory beyond weights", f"{batch.peak_bytes / 2**20:.0f} MiB")
        tables.append(table)
    device = Table(title=f"{result.device}, {result.dtype}", show_header=False)
    for name, text in (
        ("parameters", f"{result.parameters / 1e9:.3f} B, {result.weight_bytes / 1e9:.2f} GB"),
        ("memory bandwidth, measured", f"{result.bandwidth / 1e9:.1f} GB/s"),
        ("matrix product, measured", f"{result.matmul / 1e12:.3f} TFLOP/s"),
        ("threads", str(result.threads)),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("repeats", str(result.repeats)),
    ):
        device.add_row(name, text)
    return [device, *tables]
