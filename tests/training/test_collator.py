import numpy as np
import torch

from openvla_hf.data import Augmentation
from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import fake_episode, tiny_config, tiny_processor, tiny_tokenizer
from openvla_hf.training.collator import IGNORED, ActionCollator


def collator():
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    model = OpenVLAForActionPrediction(config)
    return ActionCollator(tiny_processor(tokenizer, config), model.action_tokenizer, model.get_action_stats()), model


def test_only_the_action_and_the_stop_token_are_supervised():
    collate, model = collator()
    frames = fake_episode(steps=2) + fake_episode(seed=1, steps=1, instruction="open the drawer and look inside")
    batch = collate(frames)
    for row in batch["labels"]:
        supervised = row[row != IGNORED]
        assert len(supervised) == 8
        assert supervised[-1] == collate.processor.tokenizer.eos_token_id
    assert batch["attention_mask"].sum(1).tolist() == batch["input_ids"].ne(model.config.pad_token_id).sum(1).tolist()


def test_labels_decode_to_the_actions_they_came_from():
    collate, model = collator()
    frames = fake_episode(steps=4)
    labels = collate(frames)["labels"]
    ids = torch.stack([row[row != IGNORED][:-1] for row in labels])
    actions = np.stack([frame["action"] for frame in frames])
    # A bin of each dimension's range.
    low, high = (np.array(model.get_action_stats()[name]) for name in ("q01", "q99"))
    error = np.abs(model.decode_actions(ids) - actions)
    assert (error[:, :6] <= ((high - low) / 255)[:6]).all()
    assert ((model.decode_actions(ids)[:, 6] > 0.5) == (actions[:, 6] > 0.5)).all()


def test_training_and_prediction_share_prompt_and_pixels():
    collate, _ = collator()
    frame = fake_episode(steps=1)[0]
    batch = collate([frame])
    inputs = collate.processor(frame["image"], instruction=frame["instruction"])
    prompt_length = inputs["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :prompt_length], inputs["input_ids"])
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])


def test_a_few_steps_on_one_batch_lower_the_loss():
    torch.manual_seed(0)
    collate, model = collator()
    batch = collate(fake_episode(steps=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_drawn_depends_on_the_place_in_the_run_alone():
    """Two batches of 4 are four of 2, two processes' batches of 2, and what a run that goes on draws."""
    collate, _ = collator()
    collate.augment = Augmentation(size=56)
    frames = fake_episode(steps=8)

    def draw(batches, *start):
        collate.start(*start)
        return [view for batch in batches for view in collate.views(batch)]

    whole = draw([frames[:4], frames[4:]])
    assert not np.array_equal(*(collate.augment(frames[0]["image"]) for _ in range(2)))
    np.testing.assert_array_equal(draw([frames[i : i + 2] for i in range(0, 8, 2)]), whole)
    for process in range(2):
        mine = [i for i in range(8) if i // 2 % 2 == process]
        drawn = draw([[frames[i] for i in mine[:2]], [frames[i] for i in mine[2:]]], 0, process, 2)
        np.testing.assert_array_equal(drawn, [whole[i] for i in mine])
    np.testing.assert_array_equal(draw([frames[4:]], 1), whole[4:])
