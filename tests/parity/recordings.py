"""Read the original code's recordings: the full ones, or the unpacked part that is kept here.

README.md lists what is recorded and what is kept.
"""

import functools
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoModel, AutoProcessor

import openvla_hf  # noqa: F401  registers the Auto classes


KEPT = Path(__file__).resolve().parent / "kept"
BASE = "fused-224"  # the checkpoint that is also recorded in shards and with an adapter
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
ADAPTED_HEAD = "base_model.model.language_model.lm_head.base_layer.weight"  # in an adapter, equal to its base's HEAD
TEXT_TOKENS = 32000  # the ids of text; <PAD> is the next one
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (TEXT_TOKENS, "<PAD>"))
    },
    "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 2048,
    "pad_token": "<PAD>",
    "padding_side": "right",
    "processor_class": "PrismaticProcessor",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}


def unpack(case: str, folder: Path, kept: Path = KEPT) -> Path:
    """Write a kept case into `folder`, in the layout of the full recordings."""
    source = kept / case
    if case == "sharded":
        unpack(BASE, folder, kept)
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.xz"))
    for packed in source.rglob("*.xz"):
        target = (folder / packed.relative_to(source)).with_suffix("")
        target.write_bytes(lzma.decompress(packed.read_bytes()))
    checkpoint = folder / "checkpoint"
    if case == "sharded":
        split(checkpoint)
    elif case == "lora":
        add_head_of_base(folder / "adapter" / "adapter_model.safetensors", kept)
    elif checkpoint.is_dir():
        complete(checkpoint, json.loads((folder / "prompts.json").read_text()))
    return folder


def complete(checkpoint: Path, prompts: dict[str, list[int]]) -> None:
    """Add the files that are not kept, and values for the embeddings of ids that no recording uses."""
    weights = load_file(checkpoint / "model.safetensors")
    unused = ~weights[EMBEDDING].any(dim=1)
    std = weights[EMBEDDING][~unused].float().std()
    noise = torch.randn(int(unused.sum()), weights[EMBEDDING].shape[1], generator=torch.Generator().manual_seed(0))
    weights[EMBEDDING][unused] = (noise * std).to(weights[EMBEDDING].dtype)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    statistics = json.loads((checkpoint / "config.json").read_text())["norm_stats"]
    (checkpoint / "dataset_statistics.json").write_text(json.dumps(statistics))
    tokenizer = json.loads(stand_in_tokenizer(prompts).to_str())
    tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]  # as published
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def add_head_of_base(adapter: Path, kept: Path) -> None:
    """Add the head of the base model, of which PEFT saves a copy with an adapter."""
    base = load(lzma.decompress((kept / BASE / "checkpoint" / "model.safetensors.xz").read_bytes()))
    save_file(load_file(adapter) | {ADAPTED_HEAD: base[HEAD]}, adapter, metadata={"format": "pt"})


def split(checkpoint: Path) -> None:
    """Split the weights into the shards of the index."""
    shards = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    weights = load_file(checkpoint / "model.safetensors")
    for shard in set(shards.values()):
        tensors = {name: tensor for name, tensor in weights.items() if shards[name] == shard}
        save_file(tensors, checkpoint / shard, metadata={"format": "pt"})
    (checkpoint / "model.safetensors").unlink()


def stand_in_tokenizer(prompts: dict[str, list[int]]) -> Tokenizer:
    """Build a tokenizer that gives recorded prompts their ids.

    Each id stands for the character with this code point. The normaliser replaces a whole recorded prompt with the
    characters of its ids. Any other text is tokenised character by character, except for the single merge.
    """
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    characters = {chr(index): index for index in range(len(special) + 1, TEXT_TOKENS)}
    tokenizer = Tokenizer(models.BPE(special | {"ab": len(special)} | characters, [("a", "b")], unk_token="<unk>"))
    tokenizer.add_special_tokens([*special, "<PAD>"])
    # The longest first: one recorded prompt is the beginning of another.
    longest_first = sorted(prompts.items(), key=lambda item: -len(item[0]))
    replacements = [normalizers.Replace(text, "".join(map(chr, ids[1:]))) for text, ids in longest_first]
    tokenizer.normalizer = normalizers.Sequence(replacements)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def read_tower_overrides(folder: Path) -> dict[str, dict[str, int]]:
    """The tiny towers of a recorded checkpoint, whose published config names only the full-size ones."""
    dims = json.loads((folder / "tiny_dims.json").read_text())

    def tower(name: str) -> dict[str, int]:
        width, depth, heads = (dims[name][key] for key in ("embed_dim", "depth", "num_heads"))
        return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}

    siglip = tower("siglip") | {"intermediate_size": dims["siglip_mlp_hidden"]}
    if dims["dino"] is None:
        return {"vision_config": siglip}
    return {"vision_config": tower("dino"), "fused_vision_config": siglip}


class Recorded:
    """A small checkpoint in the published layout, and the original code's outputs for it in float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.overrides = read_tower_overrides(folder)
        self.cases = json.loads((folder / "cases.json").read_text())
        self.expected = json.loads((folder / "expected.json").read_text())
        self.tensors = load_file(folder / "expected.safetensors")
        inputs = load_file(folder / "inputs.safetensors")
        self.training_batch = {name.removeprefix("train."): tensor for name, tensor in inputs.items()}
        self.images = [Image.open(folder / path) for path in self.cases["images"]]

    def load(self, loader: Any = AutoModel, **kwargs: Any) -> Any:
        kwargs = {"dtype": torch.float32} | self.overrides | kwargs
        return loader.from_pretrained(self.checkpoint, **kwargs)

    @functools.cached_property
    def model(self) -> Any:
        """The model, shared by all tests of a session, which must not change it."""
        return self.load()

    @functools.cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.checkpoint)

    @functools.cached_property
    def pixel_values(self) -> torch.Tensor:
        return self.processor.image_processor(self.images)["pixel_values"]

    @functools.cached_property
    def columns(self) -> torch.Tensor:
        """The ids whose logits are recorded: those whose rows of the head are in the checkpoint."""
        return self.model.lm_head.weight.any(dim=1).nonzero().flatten()

    @functools.cached_property
    def stride(self) -> int:
        """Step between the recorded pixels, patches, positions and rows of gradients."""
        return self.pixel_values.shape[-1] // self.tensors["pixel_values"].shape[-1]

    def prompt(self, index: int) -> torch.Tensor:
        """(1, T) ids without placeholders."""
        return torch.tensor([self.processor.tokenizer(self.cases["prompts"][index])["input_ids"]])

    def inputs(self, prediction: dict[str, Any], **kwargs: Any) -> Any:
        """The processor's output for the prompt and the image of a prediction."""
        prompt, image = self.cases["prompts"][prediction["prompt"]], self.images[prediction["image"]]
        return self.processor(prompt, image, **kwargs)
