import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from torch.utils.data import DataLoader

from openvla_hf.data import Augmentation, TrainingStream, from_episodes, load
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


@pytest.fixture(scope="module")
def frames():
    """Three episodes of five frames, and the augmented view of each in two epochs."""
    return from_episodes([fake_episode(seed=seed, steps=5) for seed in range(3)], name="tiny")


def views(frames, epoch=0, seed=0, **loader):
    """Return the pixels of each frame from a loader, by episode and frame."""
    collate, _ = collator()
    collate.augment, collate.seed = Augmentation(size=56), seed
    collate.set_epoch(epoch)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(len(loader))).tolist()
    batches = DataLoader(frames, batch_size=4, sampler=order, collate_fn=collate, **loader)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    plain = frames.with_format(None).select_columns(["episode_index", "frame_index"])
    return {tuple(plain[index].values()): one for index, one in zip(order, pixels, strict=True)}


def differing(one, other):
    assert one.keys() == other.keys()
    return sum(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_frame_is_augmented_alike_by_any_number_of_workers_in_any_order(frames, workers):
    assert differing(views(frames), views(frames, num_workers=workers)) == 0


def test_another_epoch_or_seed_augments_every_frame_differently(frames):
    first = views(frames)
    assert differing(first, views(frames, epoch=1)) == len(frames)
    assert differing(first, views(frames, seed=1)) == len(frames)
    assert len({one.numpy().tobytes() for one in first.values()}) == len(frames)


def test_workers_that_outlive_an_epoch_augment_the_next_one_differently(frames):
    collate, _ = collator()
    collate.augment = Augmentation(size=56)
    loader = DataLoader(frames, batch_size=5, collate_fn=collate, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        collate.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_a_frame_without_indices_is_augmented_by_its_image():
    collate, _ = collator()
    collate.augment = Augmentation(size=56)
    one, other = fake_episode(steps=2)
    assert "episode_index" not in one
    np.testing.assert_array_equal(collate.view(one), collate.view(dict(one)))
    frozen = np.full_like(one["image"], 128)
    frozen[0, 0] = 0
    assert not np.array_equal(collate.view({"image": frozen}), collate.view({"image": np.full_like(frozen, 128)}))
    collate.set_epoch(1)
    assert not np.array_equal(collate.view(other), collate.view(other | {"epoch": 0}))


def test_each_pass_over_a_stream_augments_its_frames_differently_for_any_readers():
    """Two readers together draw the same frames of a stream as one reader, with the same pass numbers."""
    stream = from_episodes(lambda: [fake_episode(seed=seed, steps=4) for seed in range(4)], streaming=True)

    def passes(rank, ranks, count):
        drawn = itertools.islice(TrainingStream(stream, rank, ranks), count)
        return [(row["episode_index"], row["frame_index"], row["epoch"]) for row in drawn]

    alone = passes(0, 1, 32)
    assert [epoch for *_, epoch in alone] == [0] * 16 + [1] * 16
    assert sorted(passes(0, 2, 16) + passes(1, 2, 16)) == sorted(alone)


def test_rows_of_a_plain_stream_are_augmented_alike_by_any_number_of_readers():
    rows = [frame for seed in range(3) for frame in fake_episode(seed=seed, steps=4)]
    columns = {name: [row[name] for row in rows] for name in ("image", "instruction", "action")}
    features = Features({"image": Image(), "instruction": Value("string"), "action": List(Value("float64"))})
    stream = load(Dataset.from_dict(columns, features).to_iterable_dataset(num_shards=2), name="arm", streaming=True)
    collate, _ = collator()
    collate.augment = Augmentation(size=56)

    def views(workers):
        batches = DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=workers)
        return {one.numpy().tobytes() for batch in batches for one in batch["pixel_values"]}

    alone = views(0)
    assert len(alone) == len(rows)
    assert views(2) == alone


def test_augmenting_leaves_other_random_numbers_alone(frames):
    collate, _ = collator()
    collate.augment = Augmentation(size=56)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    collate([frames[0]])
    assert torch.equal(torch.rand(2), expected)
