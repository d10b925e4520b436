"""How long an action takes, where the time goes, and how far that is from what the device can do.

Shapes: B batch, P image patches, T tokens of the prompt (placeholders included), A action dimensions.
"""

import copy
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import LogitsProcessorList
from transformers.initialization import no_init_weights

from ..modeling.action_decoding import ActionIdsOnly, action_pass
from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.model_inputs import prepare_prompts
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from ..testing import BRIDGE_LIKE_STATS, tiny_processor, tiny_tokenizer


WARM_UP = 2
INSTRUCTION = "put the red block on the yellow plate"

SMALL_TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    "fused_vision_config": {
        "hidden_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 269,
    },
}
RANDOM_SIZES: dict[str, dict[str, Any]] = {
    # openvla-7b.
    "7b": {"text_config": {"max_position_embeddings": 2048}},
    # Half a billion parameters in the language model's layers, small towers and 16 patches: reading weights takes most
    # of the time, as at 7B on a GPU, also on a CPU, where 256 patches would be bound by arithmetic.
    "0.5b": {
        "vision_config": SMALL_TOWERS["vision_config"] | {"image_size": 56},
        "fused_vision_config": SMALL_TOWERS["fused_vision_config"] | {"image_size": 56},
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "num_hidden_layers": 18,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
    },
    # The checkpoints in `tests/parity`.
    "tiny": SMALL_TOWERS
    | {
        "text_config": {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
    },
}

# What the device's own speed is measured with: too much to be cached, and soon done.
BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
MATMUL_WIDTH = {"cpu": 1024, "cuda": 8192}


def random_model(
    size: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """A model of one of `RANDOM_SIZES` with random weights, made on the device in its dtype, and its processor.

    Raises:
        ValueError: Unknown size.
    """
    check_name(size, RANDOM_SIZES, "size")
    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        norm_stats={"random": {"action": BRIDGE_LIKE_STATS}},
        **copy.deepcopy(RANDOM_SIZES[size]),
    )
    with torch.device(device), no_init_weights():
        model = OpenVLAForActionPrediction._from_config(config, dtype=dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # Words that are a token each, as most are in Llama's vocabulary.
    return model, tiny_processor(tiny_tokenizer([INSTRUCTION], merges=500), config)


# The device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure_bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes that the device reads from its memory in a second: the best of copies and products with a vector."""
    source = torch.ones(BANDWIDTH_BYTES[device.type] // dtype.itemsize // 4096, 4096, dtype=dtype, device=device)
    target, vector = torch.empty_like(source), torch.ones(4096, dtype=dtype, device=device)
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(6))
    multiplied = min(seconds(lambda: torch.mv(source, vector), device) for _ in range(6))
    return source.nbytes / min(copied / 2, multiplied)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations in a second of the product of two square matrices."""
    width = MATMUL_WIDTH[device.type]
    matrix = torch.ones(width, width, dtype=dtype, device=device)
    return 2 * width**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(6))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that a call holds at a time beyond what is held before it; `None` where nobody counts them."""
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

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


# The model's floor


@dataclass
class Work:
    """What one pass reads and computes at least: weights, and two operations for each weight and token.

    Attention and activations are left out: they add little at these lengths, and a floor may be too low.
    """

    weight_bytes: int
    operations: int

    @classmethod
    def of(cls, parameters: Sequence[torch.Tensor], tokens: int) -> "Work":
        """Every parameter is read once, and multiplied with each of the tokens."""
        return cls(sum(p.nbytes for p in parameters), 2 * tokens * sum(p.numel() for p in parameters))

    def seconds(self, bandwidth: float, matmul: float) -> float:
        """At best, when reading and computing overlap."""
        return max(self.weight_bytes / bandwidth, self.operations / matmul)


def floor(
    model: OpenVLAForActionPrediction, batch: int, prompt: int, steps: int, bandwidth: float, matmul: float
) -> dict[str, float]:
    """Seconds that the parts of an action take at least: vision, prefill, decode; and with an accepted draft."""
    base = model.model
    vision = [*base.vision_backbone.parameters(), *base.projector.parameters()]
    embedding = base.get_input_embeddings().weight
    head = model.lm_head.weight[: model.config.n_action_bins]
    language = [p for p in base.language_model.parameters() if p is not embedding]

    def least(parameters: Sequence[torch.Tensor], tokens: int) -> float:
        return Work.of(parameters, batch * tokens).seconds(bandwidth, matmul)

    parts = {
        "vision": least(vision, model.config.num_image_tokens),
        "prefill": least(language, prompt) + least([head], 1),
        "decode": (steps - 1) * least([*language, head], 1),
    }
    drafted = least(language, prompt + steps - 1) + least([head], steps)
    return parts | {"predict_action": sum(parts.values()), "accepted draft": parts["vision"] + drafted}


# Timing


@dataclass
class BatchLatency:
    """Figures for one batch size, all in seconds.

    parts: Medians of processor, vision, prefill and decode of `predict_action`.
    floor: See `floor`.
    timings: `{variant: {"median", "p95", "hz", "speedup"}}`; `hz` counts actions of all rows, `speedup` is that over
        plain `generate`.
    forward_passes: `{variant: passes of the language model}`.
    same_tokens: Whether `generate`, held to the action ids, gives the tokens of every variant.
    peak_bytes: What one `predict_action` holds beyond the weights; `None` where it can't be told.
    """

    batch_size: int
    prompt_tokens: int
    parts: dict[str, float]
    floor: dict[str, float]
    timings: dict[str, dict[str, float]]
    forward_passes: dict[str, int]
    same_tokens: bool
    peak_bytes: int | None


@dataclass
class Latency:
    """What `measure_latency` gives.

    weight_bytes: Of all weights.
    bandwidth: Bytes a second, measured.
    matmul: Operations a second, measured.
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
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # "AVX2", "AVX512", ...: what the CPU computes with says more than its name.
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
    instruction: str = INSTRUCTION,
    progress: Callable[[str], None] = lambda what: None,
) -> Latency:
    """Time `predict_action`, with a draft and without, beside `generate`; repeats of all variants take turns.

    Args:
        model: On the device that is measured.
        processor: Of the same checkpoint.
        unnorm_key: Whose number of action dimensions counts, if the model knows several.
        batch_sizes: Observations in a call.
        repeats: Of each variant.
        compile_passes: Time `compile_for_actions` too.
        instruction: What each observation is told.
        progress: Told what happens next.
    """
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
        result.batches.append(
            _measure_batch(
                model, processor, unnorm_key, batch_size, compile_passes, instruction, result, progress=progress
            )
        )
    return result


def _measure_batch(
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    unnorm_key: str | None,
    batch_size: int,
    compile_passes: bool,
    instruction: str,
    result: Latency,
    progress: Callable[[str], None],
) -> BatchLatency:
    device, config = model.device, model.config
    stats = model.get_action_stats(unnorm_key)
    steps = model.get_action_dim(unnorm_key)
    first_dimension = {name: values[:1] for name, values in stats.items() if isinstance(values, list)}
    images = list(np.random.default_rng(0).integers(0, 256, (batch_size, 256, 256, 3), np.uint8))

    def process() -> Any:
        return processor(images, instruction=[instruction] * batch_size)

    inputs = process()
    input_ids, mask = prepare_prompts(config, inputs["input_ids"], inputs["attention_mask"])
    inputs = {
        "input_ids": input_ids.to(device),
        "attention_mask": mask.to(device),
        "pixel_values": inputs["pixel_values"].to(device, model.dtype),
    }

    def predict(**options: Any) -> Any:
        return model.predict_action(**inputs, **{"stats": stats} | options)

    def generate(**options: Any) -> torch.Tensor:
        return model.generate(**inputs, do_sample=False, max_new_tokens=steps, min_new_tokens=steps, **options)

    progress(f"batch of {batch_size}: memory and tokens")
    peak_bytes = peak_memory(predict, device)
    action_ids = model.action_tokenizer
    only_actions = LogitsProcessorList([ActionIdsOnly(action_ids.first_id, action_ids.vocab_end)])
    generated = generate(logits_processor=only_actions)[:, -steps:].cpu().numpy()
    draft = predict(return_details=True).token_ids

    variants: dict[str, Callable[[], Any]] = {
        "processor": process,
        "vision": lambda: model.get_image_features(inputs["pixel_values"]),
        "first token": lambda: predict(stats=first_dimension),
        "generate": generate,
        "predict_action": predict,
        "accepted draft": lambda: predict(draft_token_ids=draft),
    }
    details = {
        "predict_action": predict(return_details=True),
        "accepted draft": predict(return_details=True, draft_token_ids=draft),
    }
    if compile_passes:
        progress(f"batch of {batch_size}: compiling")
        plain = model.action_pass, model.action_caches
        model.compile_for_actions()
        compiled = model.action_pass, model.action_caches

        def predict_compiled(**options: Any) -> Any:
            model.action_pass, model.action_caches = compiled
            prediction = predict(**options)
            fell_back = model.action_pass is action_pass
            model.action_pass, model.action_caches = plain
            return None if fell_back else prediction

        options: dict[str, dict[str, Any]] = {"compiled": {}, "compiled, accepted draft": {"draft_token_ids": draft}}
        for name, arguments in options.items():
            if (prediction := predict_compiled(return_details=True, **arguments)) is not None:
                details[name] = prediction
                variants[name] = partial(predict_compiled, **arguments)

    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-WARM_UP, result.repeats):
        progress(f"batch of {batch_size}: repeat {max(repeat, 0) + 1} of {result.repeats}")
        for name, call in variants.items():
            times[name].append(seconds(call, device))
    median = {name: float(np.median(values[WARM_UP:])) for name, values in times.items()}
    timings = {
        name: {
            "median": median[name],
            "p95": float(np.percentile(times[name][WARM_UP:], 95)),
            "hz": batch_size / median[name],
            "speedup": median["generate"] / median[name],
        }
        for name in ("generate", *details)
    }
    return BatchLatency(
        batch_size=batch_size,
        prompt_tokens=input_ids.shape[1],
        parts={
            "processor": median["processor"],
            "vision": median["vision"],
            "prefill": median["first token"] - median["vision"],
            "decode": median["predict_action"] - median["first token"],
        },
        floor=floor(model, batch_size, input_ids.shape[1], steps, result.bandwidth, result.matmul),
        timings=timings,
        forward_passes={name: prediction.forward_passes for name, prediction in details.items()},
        same_tokens=all(np.array_equal(prediction.token_ids, generated) for prediction in details.values()),
        peak_bytes=peak_bytes,
    )


def latency_tables(result: Latency) -> list[Table]:
    """The figures for a person."""

    def ms(value: float) -> str:
        return f"{1e3 * value:.1f}"

    tables = []
    for batch in result.batches:
        table = Table(
            title=f"{batch.prompt_tokens} tokens, batch of {batch.batch_size}, ms",
            caption="same tokens as generate" if batch.same_tokens else "tokens differ from generate's",
        )
        for column in ("", "median", "p95", "actions/s", "x generate", "passes", "floor", "x floor"):
            table.add_column(column, justify="right" if column else "left")
        for name, timing in batch.timings.items():
            least = batch.floor["accepted draft" if "draft" in name else "predict_action"]
            rates = f"{timing['hz']:.1f}", f"{timing['speedup']:.2f}", str(batch.forward_passes.get(name, ""))
            over = f"{timing['median'] / least:.2f}"
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
