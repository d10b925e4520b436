"""Training of policies that predict chunks of actions, from several cameras and the state."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.merge import merge_adapter
from openvla_hf.checkpoints.model_card import read_training
from openvla_hf.data import Augmentation, from_episodes, write_lerobot
from openvla_hf.evaluation.open_loop import evaluate_open_loop, load_recorded
from openvla_hf.modeling.action_networks import add_action_networks
from openvla_hf.modeling.checkpoint_files import ADAPTER_POLICY
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode
from openvla_hf.training.checkpoint_saving import last_checkpoint
from openvla_hf.training.collator import IGNORED, ChunkCollator
from openvla_hf.training.finetune import FinetuneArguments, TrainingData, build_trainer, finetune
from openvla_hf.training.recipes import recipe
from openvla_hf.training.trainer import ActionTrainer


CHUNK, CAMERAS = 3, ("front", "wrist")
PROPRIO = {
    "q01": [-1.0, -2.0, 0.5],
    "q99": [1.0, 2.0, 0.5],
    "min": [-1.1, -2.1, 0.5],
    "max": [1.1, 2.1, 0.5],
    "mean": [0.0, 0.0, 0.5],
    "std": [0.5, 1.0, 0.0],
}
NORM_STATS = {"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": PROPRIO}}
RECIPES = ("oft", "oft-discrete", "oft-diffusion")


def chunk_frames(episodes=2, steps=6, pad=True):
    """Make frames with two cameras, a state and the next actions. At the end, the last action is repeated."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(episodes):
        frames, wrist = fake_episode(index, steps), fake_episode(100 + index, steps)
        for at, frame in enumerate(frames):
            following = [min(at + ahead, steps - 1) for ahead in range(CHUNK)]
            mask = np.array([at + ahead < steps for ahead in range(CHUNK)])
            rows.append(
                {
                    "images": {"front": frame["image"], "wrist": wrist[at]["image"]},
                    "instruction": "push" if index else frame["instruction"],
                    "action": frame["action"],
                    "actions": np.stack([frames[one]["action"] for one in following]),
                    **({"chunk_mask": mask} if pad else {}),
                    "state": np.r_[rng.uniform(-1, 1, 2), 0.5],
                    "dataset": "tiny",
                    "episode_index": index,
                    "frame_index": at,
                }
            )
    return rows


def build(base, output, name="oft", dataset=None, fields=None, **arguments):
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction.from_pretrained(base)
    more = {"dtype": "float32", "batch_size": 4, "lora_rank": 4, "action_horizon": CHUNK, "learning_rate": 1e-3}
    chosen = recipe(name, **more | (fields or {}))
    add_action_networks(model, chosen.action_fields(7, len(CAMERAS), 3))
    model.norm_stats = NORM_STATS
    processor = AutoProcessor.from_pretrained(base)
    processor.cameras, processor.state_dim = list(CAMERAS), 3
    shared = {
        "config": model.config,
        "processor": processor,
        "action_tokenizer": model.action_tokenizer,
        "norm_stats": NORM_STATS,
    }
    quick = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    return ActionTrainer(
        model=chosen.prepare(model),
        args=chosen.training_arguments(str(output), **quick | arguments),
        data_collator=ChunkCollator(**shared, augment=Augmentation(size=56)),
        eval_collator=ChunkCollator(**shared),
        train_dataset=chunk_frames() if dataset is None else dataset,
        decay_step=chosen.decay_step,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def predict(model, processor, frame):
    inputs = processor(list(frame["images"].values()), instruction=frame["instruction"], state=frame["state"])
    more = {"initial_noise": np.zeros((CHUNK, 7))} if model.config.action_head == "diffusion" else {}
    return model.predict_action(**inputs, unnorm_key="tiny", **more)


def test_a_batch_has_prompts_and_normalised_chunks(base, tmp_path):
    trainer = build(base, tmp_path)
    frames = chunk_frames()[3:6]
    batch = trainer.eval_collator(frames)
    assert batch["pixel_values"].shape == (3, 12, 56, 56)
    assert batch["actions"].shape == (3, CHUNK, 7)
    low, high = (np.array(BRIDGE_LIKE_STATS[name]) for name in ("q01", "q99"))
    expected = 2 * (frames[0]["actions"] - low) / (high - low + 1e-8) - 1
    expected[:, -1] = frames[0]["actions"][:, -1]  # the gripper has a mask
    np.testing.assert_allclose(batch["actions"][0], expected, atol=1e-6)
    assert batch["action_mask"].tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    labels = batch["labels"]
    assert labels.shape == (3, 1 + CHUNK * 7)
    assert (labels[:, 0] == IGNORED).all()
    assert labels.ne(IGNORED).sum(1).tolist() == [21, 14, 7]
    np.testing.assert_allclose(batch["proprio"][0, :2], frames[0]["state"][:2] / [1, 2], atol=1e-6)
    assert batch["proprio"][:, 2].tolist() == [-1, -1, -1]  # a constant, as in predictions


def test_a_recipe_chooses_the_statistics_that_scale_actions_and_states(base, tmp_path):
    assert "action_normalization" not in recipe("oft").action_fields(7)
    frame = chunk_frames()[0]
    batch = build(base, tmp_path, fields={"action_normalization": "bounds"}).eval_collator([frame])
    low, high = (np.array(BRIDGE_LIKE_STATS[name])[:6] for name in ("min", "max"))
    expected = np.clip(2 * (frame["actions"][:, :6] - low) / (high - low + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(batch["actions"][0, :, :6], expected, atol=1e-6)
    np.testing.assert_allclose(batch["proprio"][0, :2], frame["state"][:2] / [1.1, 2.1], atol=1e-6)


def test_frames_that_do_not_fit_the_policy_are_refused(base, tmp_path):
    collator = build(base, tmp_path).eval_collator
    frame = chunk_frames()[0]
    for change, message in (
        ({"actions": frame["actions"][:2]}, r"chunk of actions has shape \(2, 7\) .*predicts \(3, 7\)"),
        ({"actions": frame["actions"][:, :6]}, "statistics have 7 dimensions"),
        ({"actions": np.full((CHUNK, 7), np.nan)}, "not finite"),
        ({"state": None}, "has no state, but the policy's has 3 dimensions"),
        ({"state": np.zeros(2)}, "state"),
        ({"state": np.full(3, np.nan)}, "state"),
        ({"images": {"front": frame["images"]["front"]}}, r"frame \(episode 0, frame 0\) has no image from 'wrist'"),
        ({"images": frame["images"] | {"top": frame["images"]["front"]}}, "the unknown camera 'top'"),
    ):
        with pytest.raises(ValueError, match=message):
            collator([frame | change])


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_and_new_networks_learn_and_the_base_stays(base, tmp_path, name):
    trainer = build(base, tmp_path, name, max_steps=12, save_strategy="no")
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    moved = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key for key in moved if "lora_" not in key and "modules_to_save" not in key} == set()
    for network in ("proprio_projector", *(() if name == "oft-discrete" else ("action_head",))):
        assert any(network in key for key in moved), network
    assert any("language_model" in key and "lora_B" in key for key in moved)
    assert any("vision_backbone" in key and "lora_B" in key for key in moved)
    assert np.mean(losses(trainer)[-3:]) < losses(trainer)[0]
    assert {"action_l1", "action_accuracy"} <= trainer.state.log_history[0].keys()


def test_the_loss_of_a_batch_in_parts_is_that_of_the_whole(base, tmp_path):
    """With chunks that are cut at the end of an episode, so that the parts have different numbers of targets."""
    frames = chunk_frames(1)[-4:]
    gradients = []
    for parts in (1, 4):
        fields = {"batch_size": 4 // parts, "gradient_accumulation_steps": parts, "augment": False, "seed": 1}
        trainer = build(base, tmp_path / str(parts), fields=fields, dataset=frames, max_steps=1, save_strategy="no")
        trainer.data_collator.augment = None
        trainer.train()
        head = trainer.model.base_model.model.action_head.modules_to_save["default"]
        gradients.append((losses(trainer)[0], head.fc2.weight.detach().clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


def test_two_steps_and_resumed_to_four_equals_four_straight(base, tmp_path):
    straight = build(base, tmp_path / "straight", save_strategy="no")
    straight.train()
    first = build(base, tmp_path / "resumed")
    first.args.max_steps = 2
    first.train()
    second = build(base, tmp_path / "resumed")
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "resumed"))
    assert losses(second) == losses(straight)
    expected = straight.model.state_dict()
    for key, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("name", "film"), [*((name, False) for name in RECIPES), ("oft", True)], ids=[*RECIPES, "oft-film"]
)
def test_a_trained_adapter_acts_alone_merged_and_as_a_whole_checkpoint(base, tmp_path, name, film):
    fields = {"learning_rate": 3e-2, "use_film": film}
    trainer = build(base, tmp_path / "run", name, max_steps=3, save_strategy="no", fields=fields)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    fields = json.loads((tmp_path / "adapter" / ADAPTER_POLICY).read_text())
    assert (fields["action_decoding"], fields["use_film"]) == ("parallel", film)
    frame = chunk_frames()[0]
    trained = trainer.model.base_model.model.eval()
    expected = predict(trained, trainer.eval_collator.processor, frame)
    assert expected.shape == (CHUNK, 7)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for folder in ("adapter", "merged"):
        for auto in (AutoModel, AutoProcessor):
            auto.from_pretrained(tmp_path / folder).save_pretrained(tmp_path / f"{folder} again")
    for folder in ("adapter", "adapter again", "merged", "merged again"):
        processor = AutoProcessor.from_pretrained(tmp_path / folder)
        model = AutoModel.from_pretrained(tmp_path / folder)
        assert processor.cameras == list(CAMERAS)
        if name == "oft-discrete":
            assert np.array_equal(predict(model, processor, frame), expected)
        else:
            # Each of the diffusion's 50 passes starts from the result of the last.
            atol = 1e-4 if name == "oft-diffusion" else 1e-5
            np.testing.assert_allclose(predict(model, processor, frame), expected, rtol=0, atol=atol)
    plain = OpenVLAForActionPrediction.from_pretrained(base)
    plain.load_adapter(str(tmp_path / "adapter"))
    np.testing.assert_allclose(predict(plain, processor, frame), expected, rtol=0, atol=1e-4)


def test_an_adapter_that_lacks_a_network_or_fits_another_policy_is_refused(base, tmp_path):
    trainer = build(base, tmp_path / "run", max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    other = OpenVLAForActionPrediction.from_pretrained(base)
    add_action_networks(other, recipe("oft", action_horizon=5).action_fields(7, 2, 3))
    with pytest.raises(ValueError, match="action_horizon=3, but the model already has networks for action_horizon=5"):
        other.load_adapter(str(tmp_path / "adapter"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(key for key in weights if key.endswith("action_head.fc2.bias"))
    del weights[name]
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights of modules that were trained in full are missing.*fc2\.bias"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_the_learning_rate_drops_to_a_tenth_after_the_decay_step(base, tmp_path):
    fields = {"decay_step": 2, "learning_rate": 1e-3}
    trainer = build(base, tmp_path, fields=fields, save_strategy="no")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="decay_step=2 needs the schedule 'constant', got 'linear'"):
        recipe("oft", lr_scheduler_type="linear", **fields)


def test_fields_of_chunks_need_an_action_head():
    chosen = {"action_horizon": 8, "use_state": True, "use_film": True, "action_normalization": "bounds"}
    for fields in ({name: value} for name, value in chosen.items()):
        with pytest.raises(ValueError, match="need an action_head: start from the recipe 'oft'"):
            recipe("lora", **fields)
    with pytest.raises(ValueError, match="action_head 'l2'"):
        recipe("oft", action_head="l2")
    with pytest.raises(ValueError, match="action_normalization 'minmax'"):
        recipe("oft", action_normalization="minmax")


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Two episodes of a robot with two cameras and a state, on disk."""
    episodes = [[frame for frame in chunk_frames() if frame["episode_index"] == index] for index in range(2)]
    numbers = ("images", "instruction", "action", "state")
    rows = [[{name: frame[name] for name in numbers} for frame in episode] for episode in episodes]
    for episode in rows:  # the encoder of videos needs this many pixels
        for frame in episode:
            frame["images"] = {
                name: np.kron(image, np.ones((2, 2, 1), np.uint8)) for name, image in frame["images"].items()
            }
    return write_lerobot(rows, tmp_path_factory.mktemp("chunks") / "arm", frequency=20.0)


def teach_arm(base, arm, output, name, **more):
    """Fine-tune a policy on the arm's data for two steps."""
    settings = {"action_horizon": CHUNK, "batch_size": 4, "lora_rank": 4, "max_steps": 2, "use_cpu": True}
    settings |= {"save_strategy": "no", "logging_steps": 1, "dataloader_num_workers": 0, "disable_tqdm": True}
    data = TrainingData(arm, {"cameras": list(CAMERAS)})
    return finetune(FinetuneArguments(model=base, data=data, output=output, recipe=name, settings=settings | more))


def test_a_recipe_of_chunks_reads_its_data_trains_and_leaves_a_policy(base, arm, tmp_path):
    assert teach_arm(base, arm, tmp_path / "run", "oft").figures["action_l1"] > 0
    model, processor = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModel, AutoProcessor))
    assert (model.config.num_images, model.config.proprio_dim, model.config.action_horizon) == (2, 3, CHUNK)
    assert (processor.cameras, processor.state_dim) == (list(CAMERAS), 3)
    assert processor.image_processor.center_crop_area == 0.9
    training = read_training(tmp_path / "run")
    frames = load_recorded(str(arm), training, split="train")
    report = evaluate_open_loop(model, processor, frames)
    assert report.frames == len(frames) == 2 * (6 - CHUNK + 1)
    assert len(report.mean_absolute_error) == 7
    card = (tmp_path / "run" / "README.md").read_text()
    assert "processor([front, wrist], instruction=" in card
    assert "state=state" in card
    assert "3 actions, l1 head" in card
    assert describe(tmp_path / "run").oft["num_images"] == 2
    assert "a tenth after 100000 steps" in card


@pytest.mark.slow
def test_an_action_head_that_learns_on_a_base_of_four_bits_acts_on_the_whole_base(base, arm, tmp_path):
    pytest.importorskip("bitsandbytes")
    result = teach_arm(base, arm, tmp_path / "run", "qlora", action_head="l1", use_state=True, learning_rate=3e-2)
    assert np.isfinite(result.figures["loss"])
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    head = {name: tensor for name, tensor in weights.items() if "action_head" in name}
    assert head, "the head was not saved"
    model, processor = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModel, AutoProcessor))
    for name, tensor in head.items():
        saved = model.get_parameter(name.removeprefix("base_model.model."))
        torch.testing.assert_close(saved, tensor.to(saved.dtype), rtol=0, atol=0)
    frame = chunk_frames()[0]
    images = list(frame["images"].values())
    inputs = processor(images, instruction=frame["instruction"], state=frame["state"])
    assert model.predict_action(**inputs).shape == (CHUNK, 7)


def swapped(frames):
    return [frame | {"images": dict(reversed(frame["images"].items()))} for frame in frames]


def test_images_are_taken_by_the_names_of_the_cameras(base, tmp_path):
    trainer = build(base, tmp_path)
    frames = chunk_frames()[:2]
    for collator in (trainer.data_collator, trainer.eval_collator):
        assert torch.equal(collator(swapped(frames))["pixel_values"], collator(frames)["pixel_values"])


def test_a_policy_is_evaluated_on_images_by_the_names_of_the_cameras(base):
    processor = AutoProcessor.from_pretrained(base, cameras=list(CAMERAS))
    model = OpenVLAForActionPrediction.from_pretrained(base)
    add_action_networks(model, recipe("oft", action_horizon=CHUNK, use_state=False).action_fields(7, 2, None))
    model.norm_stats = NORM_STATS
    frames = [frame | {"action_mask": np.arange(7) < 6} for frame in chunk_frames()[:2]]
    report = evaluate_open_loop(model, processor, frames)
    assert evaluate_open_loop(model, processor, swapped(frames)) == report
    processor.cameras.reverse()
    assert evaluate_open_loop(model, processor, frames) != report
    processor.cameras = ["front", "top"]
    with pytest.raises(ValueError, match="unknown camera 'wrist'"):
        evaluate_open_loop(model, processor, frames)


def test_a_base_that_knows_the_cameras_keeps_their_order(base, tmp_path):
    model, processor = OpenVLAForActionPrediction.from_pretrained(base), AutoProcessor.from_pretrained(base)
    chosen = recipe("oft", action_horizon=CHUNK)
    add_action_networks(model, chosen.action_fields(7, 2, 3))
    processor.cameras, processor.state_dim = list(CAMERAS), 3
    for part in (model, processor):
        part.save_pretrained(tmp_path / "oft")
    for names, expected in ((("wrist", "front"), CAMERAS), (("top", "wrist"), ("top", "wrist"))):
        images = [dict(zip(names, frame["images"].values(), strict=True)) for frame in chunk_frames()]
        episode = [frame | {"images": one} for frame, one in zip(chunk_frames(), images, strict=True)]
        frames = from_episodes([episode], name="tiny", cameras=list(names), chunk=CHUNK, state=True)
        arguments = FinetuneArguments(
            model=tmp_path / "oft",
            data=frames,
            output=tmp_path / "run",
            recipe="oft",
            settings={"action_horizon": CHUNK, "use_cpu": True},
            statistics=NORM_STATS,
        )
        assert build_trainer(arguments).eval_collator.processor.cameras == list(expected)


def test_a_recipe_of_chunks_names_what_the_data_lack(base, tmp_path):
    episodes = [[frame | {"state": None} for frame in fake_episode(seed, 6)] for seed in range(2)]
    data = from_episodes(episodes, name="arm", chunk=CHUNK)
    arguments = FinetuneArguments(
        model=base, data=data, output=tmp_path / "run", recipe="oft", settings={"use_cpu": True}
    )
    with pytest.raises(ValueError, match=r"statistics of 'arm' have no state.*use_state=false"):
        build_trainer(arguments)


@pytest.mark.parametrize(("name", "head"), [("full", "l1"), ("last-layer", "l1"), ("frozen-vision", "diffusion")])
def test_recipes_without_adapters_train_the_new_networks_too(base, name, head):
    model = OpenVLAForActionPrediction.from_pretrained(base)
    chosen = recipe(name, action_head=head, action_horizon=CHUNK, use_state=True, use_film=True)
    add_action_networks(model, chosen.action_fields(7, 1, 3))
    learns = {key for key, one in chosen.prepare(model).named_parameters() if one.requires_grad}
    networks = ("action_head", "proprio_projector", "film_scale", "film_shift")
    for network in (*networks, *(["noisy_action_projector"] if head == "diffusion" else [])):
        assert {key for key, _ in model.named_parameters() if f"{network}." in key} <= learns


def test_the_accuracy_of_tokens_compares_ids(base, tmp_path):
    """Two ids stand for the highest value, so values alone would not tell them apart."""
    trainer = build(base, tmp_path, "oft-discrete")
    batch = trainer.eval_collator(chunk_frames()[:4])
    model = trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    actions = batch["labels"][:, 1:-1]
    equal = (outputs.logits.argmax(-1)[:, :-1] == actions)[actions.ne(IGNORED)]
    assert trainer.evaluation_metrics.take()["action_accuracy"] == pytest.approx(float(equal.float().mean()))
    outputs.logits.zero_().scatter_(2, batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1), 1.0)
    trainer.evaluation_metrics.update(outputs.logits.argmax(-1), batch["labels"][:, 1:], None)
    assert trainer.evaluation_metrics.take()["action_accuracy"] == 1


def test_the_noise_of_a_diffusion_head_differs_between_batches_and_processes(base, tmp_path, monkeypatch):
    trainer = build(base, tmp_path, "oft-diffusion")
    actions = torch.zeros(4, CHUNK, 7)
    draws = [trainer._draw_noise(actions)["noise"] for _ in range(2)]
    assert not torch.equal(*draws)
    trainer.check_step()
    assert torch.equal(trainer._draw_noise(actions)["noise"], draws[0])  # the same after a resume at this step
    trainer.check_step()
    monkeypatch.setattr(type(trainer.args), "process_index", 1)
    assert not torch.equal(trainer._draw_noise(actions)["noise"], draws[0])
