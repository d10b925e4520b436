"""Tiny pretrained parts of a policy, in the layouts that models on the Hub have."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from openvla_hf.testing import N_ACTION_BINS, tiny_tokenizer


TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
DINOV2_TIMM, SIGLIP_TIMM = "vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"
# Names in timm -> names in transformers.
BLOCKS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SIGLIP_BLOCKS = BLOCKS | {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}


def _filled(model, seed):
    """Fill a model with random weights, larger than those of a new one so that inputs matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


def write_dinov2(folder, image_size=98, **fields):
    model = _filled(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TOWER, image_size=image_size, **fields)), 0)
    model.save_pretrained(folder)
    return model


def write_siglip(folder, image_size=56, **fields):
    """Write a SigLIP with its text tower, and return the vision tower."""
    vision = TOWER | {"intermediate_size": 128, "image_size": image_size, **fields}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = _filled(SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": 9})), 1)
    model.save_pretrained(folder)
    return model.vision_model


def llama_tokenizer():
    """Build a tokenizer like Llama-2's: without padding, and with rare tokens at the end, which become the actions."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["added_tokens"] = state["added_tokens"][:3]
    for piece in ["▁", *(f"<rare_{index}>" for index in range(N_ACTION_BINS))]:
        vocab[piece] = len(vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_llama(folder, tokenizer=None, shards=False, **fields):
    tokenizer = tokenizer or llama_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    model = _filled(LlamaForCausalLM(LlamaConfig(**sizes | limits | fields)), 2)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    tokenizer.save_pretrained(folder)
    return model


def write_timm(folder, model, architecture):
    """Write a tower of transformers in timm's layout."""
    state, is_dinov2 = model.state_dict(), architecture == DINOV2_TIMM
    blocks, attention = ("encoder.layer", "attention") if is_dinov2 else ("encoder.layers", "self_attn")
    patches = "embeddings.patch_embeddings.projection" if is_dinov2 else "embeddings.patch_embedding"
    norm = "layernorm" if is_dinov2 else "post_layernorm"
    timm = {"patch_embed.proj": patches, "norm": norm}
    for index in range(model.config.num_hidden_layers):
        names = BLOCKS if is_dinov2 else SIGLIP_BLOCKS
        timm |= {f"blocks.{index}.{one}": f"{blocks}.{index}.{other}" for one, other in names.items()}
    weights = {f"{one}.{kind}": state[f"{other}.{kind}"] for one, other in timm.items() for kind in ("weight", "bias")}
    for index in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"{blocks}.{index}.{attention}.{one}_proj.{kind}"] for one in "qkv"]
            weights[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
        for one in (1, 2) if is_dinov2 else ():
            weights[f"blocks.{index}.ls{one}.gamma"] = state[f"{blocks}.{index}.layer_scale{one}.lambda1"]
    if is_dinov2:
        positions = state["embeddings.position_embeddings"]
        weights["cls_token"] = state["embeddings.cls_token"] + positions[:, :1]
        weights["reg_token"] = state["embeddings.register_tokens"]
        weights["pos_embed"] = positions[:, 1:]
    else:
        weights["pos_embed"] = state["embeddings.position_embedding.weight"].unsqueeze(0)
        weights["attn_pool.latent"] = torch.zeros(1, 1, 32)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = {"architecture": architecture, "num_features": 32, "model_args": {"embed_dim": 32, "num_heads": 2}}
    (folder / "config.json").write_text(json.dumps(config))
