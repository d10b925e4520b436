import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.integrations import get_available_reporting_integrations

import openvla_hf
from openvla_hf.cli import build_parser
from openvla_hf.cli.config_file import insert_config
from openvla_hf.cli.finetune import read_arguments
from openvla_hf.modeling.configuration_openvla import OpenVLAConfig
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import ActionCollator
from openvla_hf.training.recipes import RECIPES, estimate_cost, recipe
from openvla_hf.training.trainer import supervised_positions


PAPER_LORA_PARAMETERS = 110_828_288
PAPER_SINGLE_TOWER = {"last-layer": 465.0, "frozen-vision": 6760.4}  # millions
# Parts of the single tower that the paper trains and this package leaves out: last block, final norm, pooling head.
PAPER_NEVER_READ = 7188.1 - 7157.6


def published(backbone):
    return OpenVLAConfig(vision_backbone_id=backbone, text_config={})


def learning(name, **fields):
    model = OpenVLAForActionPrediction(tiny_config())
    recipe(name, lora_rank=2 if "lora" in name else 0, dtype="float32", **fields).prepare(model)
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_adapts_every_linear_layer_that_is_read_and_nothing_else():
    model = OpenVLAForActionPrediction(tiny_config())
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert {name.split(".lora_")[0] for name in learning("lora")} == linear


def test_lora_as_published_adapts_the_patch_embeddings_and_the_head_too():
    more = {name.split(".lora_")[0] for name in learning("lora-paper") - learning("lora")}
    assert {name.rsplit(".", 1)[-1] for name in more} == {"lm_head", "projection", "patch_embedding"}


def test_partial_recipes_train_what_they_name():
    last = learning("last-layer")
    assert {name.split(".")[3] if "layers" in name else "-" for name in last} == {"1", "-"}
    assert not any("vision" in name or "projector" in name for name in last)
    assert learning("sandwich") - last == {
        name for name in learning("full") if "vision" in name or "projector" in name
    }
    assert learning("full") - learning("frozen-vision") == {name for name in learning("full") if "vision" in name}


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_configs_for_pretraining_give_the_batch_of_the_paper_on_any_number_of_gpus(gpus):
    config = Path(openvla_hf.__file__).parent / "configs" / f"openx-{gpus}.toml"
    argv = ["finetune", "--config", str(config), "--model", "some/vlm", "--data-dir", "oxe", "--output", "out"]
    arguments = read_arguments(build_parser().parse_args(insert_config(argv)))
    fields = {name: arguments.settings[name] for name in ("batch_size", "gradient_accumulation_steps")}
    chosen = recipe(arguments.recipe, dtype="bfloat16", **fields)
    assert gpus * chosen.batch_size * chosen.gradient_accumulation_steps == 2048
    paper = dataclasses.replace(RECIPES["full"], gradient_checkpointing=True, **fields)
    assert chosen == paper
    assert (paper.learning_rate, paper.lr_scheduler_type, paper.max_grad_norm) == (2e-5, "constant", 1.0)


def test_the_small_recipe_for_pretraining_trains_everything_after_a_warm_up():
    small = recipe("openx-small")
    args = small.training_arguments("out")
    assert small.trained == RECIPES["full"].trained
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant_with_warmup", 500)
    assert args.train_batch_size * args.gradient_accumulation_steps == 256


def test_every_field_can_be_overridden_and_a_wrong_name_is_refused_in_one_sentence():
    assert recipe("lora", lora_rank=64, learning_rate=1e-4).lora_rank == 64
    with pytest.raises(ValueError, match="Did you mean 'lora_rank'"):
        recipe("lora", lora_ranks=64)
    with pytest.raises(ValueError, match="Did you mean 'last-layer'"):
        recipe("last_layer")
    with pytest.raises(ValueError, match="trains nothing"):
        recipe("lora", lora_rank=0).prepare(OpenVLAForActionPrediction(tiny_config()))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"lerning_rate": 1e-3}, "Unknown setting 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"lora_ranks": 8}, "Unknown setting 'lora_ranks'. Did you mean 'lora_rank'?"),
        ({"lora_rank": 8}, "lora_rank is a field of the recipe."),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'."),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan."),
        ({"learning_rate": -1}, "learning_rate must be at least 0, got -1."),
        ({"num_train_epochs": True}, "num_train_epochs must be a number, got True."),
        ({"bf16": "yes"}, "bf16 must be true or false, got 'yes'."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0."),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be an integer, got 2.5."),
        ({"optim_args": 3}, "optim_args must be a string or null, got 3."),
        ({"lr_scheduler_type": "cosin"}, "Unknown lr_scheduler_type 'cosin'. Did you mean 'cosine'?"),
        ({"report_to": "boards"}, "boards is not supported"),
        ({"metric_for_best_model": "l1"}, "Unknown metric_for_best_model 'l1'. Use loss,"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be below 1, got 1.0."),
    ],
)
def test_an_impossible_setting_is_refused_in_one_sentence(tmp_path, setting, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        recipe("lora").training_arguments(str(tmp_path / "out"), **setting)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1."),
        ({"lora_rank": "eight"}, "lora_rank must be an integer, got 'eight'."),
        ({"lora_dropout": 1}, "lora_dropout must be below 1, got 1."),
        ({"trained": "lm_head"}, "trained must be a list of names such as [\"lm_head\"], got 'lm_head'."),
        ({"dtype": "bfloat"}, "Unknown dtype 'bfloat'. Did you mean 'bfloat16'?"),
        ({"augment": "no"}, "augment must be true or false, got 'no'."),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
    ],
)
def test_an_impossible_field_of_a_recipe_is_refused_in_one_sentence(field, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        recipe("lora", **field)


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(tmp_path):
    missing = sorted({"tensorboard", "wandb", "trackio", "swanlab"} - set(get_available_reporting_integrations()))
    if not missing:
        pytest.skip("every tracker is installed")
    with pytest.raises(ImportError, match=f"The tracker '{missing[0]}' can't be used: .*install"):
        recipe("lora").training_arguments(str(tmp_path / "out"), report_to=missing[0])


@pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("action_l1/arm", False), ("action_accuracy", True)])
def test_the_best_checkpoint_is_that_of_the_lowest_error_or_the_highest_accuracy(tmp_path, metric, greater):
    args = recipe("lora").training_arguments(str(tmp_path / "out"), metric_for_best_model=metric)
    assert args.greater_is_better is greater


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_recipe_is_float32_on_the_cpu(tmp_path):
    chosen = recipe("lora")
    args = chosen.training_arguments(str(tmp_path / "out"))
    assert chosen.dtype == "float32"
    assert args.use_cpu
    assert not args.bf16
    assert args.device.type == "cpu"
    assert recipe("lora", dtype="bfloat16").training_arguments(str(tmp_path / "out")).bf16


@pytest.mark.slow
def test_counts_at_full_size_are_those_of_the_paper():
    single = published("siglip-vit-so400m")
    for name, millions in PAPER_SINGLE_TOWER.items():
        assert estimate_cost(single, recipe(name)).trainable / 1e6 == pytest.approx(millions, abs=0.1)
    sandwich = estimate_cost(single, recipe("sandwich")).trainable / 1e6
    assert sandwich + PAPER_NEVER_READ == pytest.approx(914.2, abs=0.2)

    fused = published("dinosiglip-vit-so-224px")
    rank = RECIPES["lora-paper"].lora_rank
    shared = sum(  # the paper's q, k and v are one layer, with one A
        2 * rank * tower.hidden_size * fused.vision_layers_built(tower) for tower in fused.vision_configs
    )

    def adapters(*layers):
        return sum(rank * (inputs + outputs) for inputs, outputs in layers)

    def block(width, inner):
        return adapters((width, 3 * width), (width, width), (width, inner), (inner, width))

    never_read = block(1024, 4096) + block(1152, 4304)
    never_read += adapters((1152, 1152), (1152, 2304), (1152, 1152), (1152, 4304), (4304, 1152))  # attn_pool
    ours = estimate_cost(fused, recipe("lora-paper")).trainable
    assert ours - shared + never_read == PAPER_LORA_PARAMETERS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(checkpointing):
    """In bfloat16, as in the estimate. Tensors that are views of the same memory count once."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, text_width=256, text_layers=4, vision_width=128, heads=4, image_size=112)
    fields = {"dtype": "bfloat16", "batch_size": 4}
    chosen = recipe("full", gradient_checkpointing=checkpointing, **fields)
    model = OpenVLAForActionPrediction(config).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    processor = tiny_processor(tokenizer, config)
    batch = ActionCollator(processor, model.action_tokenizer, model.get_action_stats())(fake_episode(steps=4))
    positions, _ = supervised_positions(batch.pop("labels"))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, logits_to_keep=positions)
    prompt = batch["input_ids"].shape[1] - config.num_image_tokens
    estimate = estimate_cost(config, chosen, prompt_tokens=prompt).activations * 2**30
    if checkpointing:  # checkpointing keeps the inputs of blocks where hooks do not see them
        full = estimate_cost(config, recipe("full", **fields), prompt_tokens=prompt).activations * 2**30
        assert estimate < full / 2
    else:
        assert 0.6 < estimate / sum(kept.values()) < 1.6
