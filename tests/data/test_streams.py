"""Streams in training: which reader draws which frames and how often, and which images are decoded."""

import itertools
import pickle
import threading
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, interleave_datasets
from torch.utils.data import DataLoader

from openvla_hf.data import (
    Gripper,
    Robot,
    compute_statistics,
    from_episodes,
    load,
    mix,
    write_lerobot,
    write_rlds,
)
from openvla_hf.data.streams import EvaluationStream, FrameStream, TrainingStream


def keys(drawn):
    return [(frame["episode_index"], frame["frame_index"]) for frame in drawn]


def take(stream, count):
    return list(itertools.islice(stream, count))


@pytest.fixture
def write(make_episode, tmp_path):
    """Write one file for each episode, with the given lengths."""

    def write(*lengths, name="arm"):
        episodes = [make_episode(index, steps=steps) for index, steps in enumerate(lengths)]
        return write_rlds(episodes, tmp_path / name, episodes_per_file=1).parent

    return write


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
@pytest.mark.parametrize(
    ("readers", "lengths"),
    [
        (1, [5, 5, 5]),
        (4, [10] * 5),
        (4, [2, 30, 10, 4, 6]),
        (4, [2, 30, 10, 4]),
        (8, [20, 40, 20]),
        (5, [60]),
        (12, [20, 20]),
    ],
)
def test_readers_draw_every_frame_equally(write, without_images, readers, lengths, shuffle_buffer):
    stream = load(write(*lengths), streaming=True, shuffle_buffer=shuffle_buffer)
    passes, total = 3, sum(lengths)
    drawn = Counter(
        key for reader in range(readers) for key in keys(take(TrainingStream(stream, reader, readers), passes * total))
    )
    due = passes * readers
    assert len(drawn) == total
    assert set(drawn.values()) == {due}


@pytest.mark.parametrize(("readers", "lengths"), [(2, [5, 9, 3, 7]), (3, [40, 30])])
def test_one_reader_draws_each_frame_of_a_pass_and_each_pass_has_its_own_order(
    write, without_images, readers, lengths
):
    stream = load(write(*lengths), streaming=True, shuffle_buffer=8)
    drawn = [take(TrainingStream(stream, reader, readers), 2 * readers * sum(lengths)) for reader in range(readers)]
    seen = Counter((*key, frame["epoch"]) for mine in drawn for key, frame in zip(keys(mine), mine, strict=True))
    assert set(seen.values()) == {1}
    # All readers have finished the passes before the last one.
    for epoch in range(2 * readers):
        assert sum(number == epoch for *_, number in seen) == sum(lengths)
    # A reader comes back to the same group after as many passes as there are readers.
    orders = [[keys([frame])[0] for frame in drawn[0] if frame["epoch"] == epoch] for epoch in (0, readers)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_draws_are_even_at_any_time(write, without_images):
    stream = load(write(*[10] * 5), streaming=True)
    readers = [iter(TrainingStream(stream, rank, 4)) for rank in range(4)]
    drawn = Counter()
    for step in range(1, 160):
        drawn.update(keys(next(reader) for reader in readers))
        assert all(abs(drawn[episode, frame] - 4 * step / 50) < 3 for episode in range(5) for frame in range(10))


@pytest.mark.parametrize("files", [5, 2])
def test_workers_of_ranks_draw_every_frame_equally(write, files):
    stream = load(write(*[20] * files), streaming=True)
    drawn = Counter()
    for rank in range(2):
        loader = DataLoader(TrainingStream(stream, rank, 2, 4), batch_size=4, num_workers=2, collate_fn=keys)
        # A pass is five batches for each file, and each of the two workers makes one pass.
        for batch in itertools.islice(loader, 2 * 5 * files):
            drawn.update(batch)
    assert set(drawn.values()) == {4}
    assert len(drawn) == 20 * files


def test_each_pass_over_a_shuffled_stream_has_its_own_order(write, without_images):
    stream = load(write(*[6] * 5), streaming=True, shuffle_buffer=8)
    for repeated in (TrainingStream(stream), stream.repeat(None), stream.repeat(3), mix([(stream, 1.0, 30)])):
        order = keys(take(repeated, 90))
        passes = [order[start : start + 30] for start in (0, 30, 60)]
        assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
        assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [len(list(stream.repeat(times))) for times in (0, 1, 2)] == [0, 30, 60]


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_a_reader_decodes_only_what_it_draws(write, decoded, readers):
    stream = load(write(40, 40, 40), streaming=True)
    for rank in range(readers):
        take(TrainingStream(stream, rank, readers), 10)
    assert len(decoded) == 10 * readers


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_used_frames_are_skipped_without_decoding(write, decoded, shuffle_buffer):
    stream = load(write(20, 20), streaming=True, shuffle_buffer=shuffle_buffer)
    straight = take(TrainingStream(stream, batch_size=4), 60)
    decoded.clear()
    resumed = TrainingStream(stream, batch_size=4)
    resumed.first_batch = 13
    rest = take(resumed, 60)
    assert rest[: 13 * 4] == [{}] * 13 * 4
    assert keys(rest[13 * 4 :]) == keys(straight[13 * 4 :])
    assert len(decoded) == 8


@pytest.mark.parametrize(
    ("ranks", "workers", "batch_size"),
    [(1, 1, 8), (1, 2, 4), (4, 2, 1), (8, 1, 2)],
    ids=lambda value: str(value),
)
def test_other_numbers_of_ranks_and_workers_continue_with_the_same_samples(
    write, without_images, monkeypatch, ranks, workers, batch_size
):
    stream = mix([(load(write(9, 4, 7, 20, 3), streaming=True, shuffle_buffer=5), 1.0, 43)], seed=3)

    def steps(ranks, workers, batch_size, used, count, order=None):
        """Return the samples of the steps after the used ones, as `workers` of each of the ranks give them."""
        batches = 16 // ranks // batch_size  # of a step of 16 samples
        drawn = Counter()
        for rank, worker in itertools.product(range(ranks), range(workers)):
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr("torch.utils.data.get_worker_info", lambda info=info: info)
            mine = TrainingStream(stream, rank, ranks, batch_size)
            mine.first_batch, mine.order = used * batches, order
            numbers = range(worker, (used + count) * batches, workers)
            frames = take(mine, len(numbers) * batch_size)
            for place, frame in enumerate(frames):
                if frame:
                    drawn[numbers[place // batch_size] // batches, *keys([frame])] += 1
        return drawn

    straight = steps(2, 2, 4, 0, 6)
    rest = Counter({key: count for key, count in straight.items() if key[0] >= 3})
    assert steps(ranks, workers, batch_size, 3, 3, order=(4, 4)) == rest


def test_a_mixture_continues_from_a_position_without_decoding_used_frames(write, decoded):
    parts = [(load(write(20, name=name), streaming=True), 1.0, 20) for name in ("one", "other")]
    mixture = mix(parts)
    reading = iter(mixture)
    take(reading, 30)
    position = mixture.state_dict()
    expected = keys(take(reading, 10))
    decoded.clear()
    resumed = mix(parts)
    resumed.load_state_dict(position)
    assert keys(take(resumed, 10)) == expected
    assert len(decoded) <= 11


def test_weights_multiply_the_frames_of_streams_as_of_tables(make_episode, without_images, tmp_path):
    sizes = {"small": 12, "middle": 60, "large": 120}
    for name, size in sizes.items():
        write_lerobot([make_episode(0, steps=size // 2), make_episode(1, steps=size // 2)], tmp_path / name)
    streams = {name: load(tmp_path / name, streaming=True) for name in sizes}
    assert {name: stream.num_frames for name, stream in streams.items()} == sizes
    for weights in ({"small": 1, "middle": 1, "large": 1}, {"small": 10, "middle": 1, "large": 0.5}):
        mixture = TrainingStream(mix([(stream, weights[name]) for name, stream in streams.items()]))
        drawn = Counter(row["dataset"] for row in take(mixture, 2000))
        table = mix([(load(tmp_path / name), weights[name]) for name in sizes])
        counts = Counter(table.with_format(None)["dataset"])
        total = sum(weights[name] * size for name, size in sizes.items())
        for name, size in sizes.items():
            due = weights[name] * size / total
            assert drawn[name] / 2000 == pytest.approx(due, abs=0.03)
            assert counts[name] / len(table) == pytest.approx(due, abs=0.12)


def test_a_stream_of_unknown_size_in_a_mixture_needs_its_number_of_frames(write, make_episode):
    made = from_episodes(lambda: [make_episode(0)], name="made", streaming=True)
    stored = load(write(6, 6), streaming=True)
    plain = Dataset.from_dict({"a": [1, 2]}).to_iterable_dataset()
    for stream, name in ((made, "'made'"), (stored, "'arm'"), (plain, "part 1")):
        with pytest.raises(ValueError, match=rf"number of frames of {name} is not known.*num_frames"):
            mix([(made, 1.0, 6), (stream, 1.0)])
    assert len(take(mix([(made, 1.0, 6), (stored, 1.0, 12)]), 20)) == 20
    with pytest.raises(ValueError, match="Mix all datasets at once"):
        mix([(mix([(made, 1.0, 6)]), 1.0), (stored, 1.0, 12)])


def test_the_card_of_a_plain_dataset_gives_its_number_of_frames(episodes, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    rows = [frame for each in episodes for frame in each]
    columns = {name: [row[name] for row in rows] for name in ("image", "instruction", "action")}
    features = Features({"image": Image(), "instruction": Value("string"), "action": List(Value("float32"))})
    table = Dataset.from_dict(columns, features=features)
    table.to_parquet(folder / "train.parquet")
    assert load(folder, streaming=True).num_frames is None
    card = f"---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: {len(table)}\n---\n"
    (folder / "README.md").write_text(card)
    assert load(folder, streaming=True).num_frames == 30
    assert load(table.to_iterable_dataset(), streaming=True).num_frames is None


def test_frames_that_are_left_out_or_joined_do_not_count(make_episode, tmp_path):
    write_lerobot([make_episode(0, steps=9)], tmp_path / "arm")
    moving = Robot("arm", space="end_effector_delta", gripper=Gripper())
    assert load(tmp_path / "arm", moving, streaming=True, every=2).num_frames == 5
    assert load(tmp_path / "arm", moving, streaming=True, drop_idle=True).num_frames is None


def test_statistics_beside_rlds_files_give_their_number_of_frames(write):
    folder = write(6, 8, 10)
    (folder / "1.0.0" / "dataset_statistics_0a1b.json").write_text('{"num_transitions": 48, "num_trajectories": 6}')
    assert load(folder, streaming=True).num_frames == 24


def test_statistics_of_a_mixture_of_streams_take_a_pass_over_each(write, decoded):
    one, other = (
        load(write(*lengths, name=name), streaming=True) for name, lengths in (("one", [6]), ("other", [4, 5]))
    )
    found = compute_statistics(mix([(one, 1.0, 6), (other, 3.0, 9), (one, 2.0, 6)]))
    assert found == compute_statistics(one) | compute_statistics(other)
    assert [each["num_transitions"] for each in found.values()] == [6, 9]
    assert compute_statistics(one.repeat(None)) == compute_statistics(one)
    assert decoded == []


BITS = 9  # of the numbers that frames show
SHOWN = (6, 40)  # episodes and their steps in `numbered`


@pytest.fixture
def numbered():
    """Episodes whose frames show their number in the dataset as black and white bars."""

    def show(number):
        bits = [255 * (number >> bit & 1) for bit in range(BITS)]
        return np.kron(np.array(bits, np.uint8)[None, :, None], np.ones((32, 32, 3), np.uint8))

    episodes, steps = SHOWN
    return [
        [
            {"image": show(number), "instruction": "count", "action": np.full(7, number, np.float32)}
            for number in range(index * steps, (index + 1) * steps)
        ]
        for index in range(episodes)
    ]


def shown(image):
    return sum(int(image[16, 32 * bit + 16].mean() > 127) << bit for bit in range(BITS))


def run_threads(*functions):
    """Run functions at the same time, each in a thread, and return what they return."""
    results = {}

    def run(index):
        results[index] = functions[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(functions))]


def store_images_in_parquet(episodes, path):
    rows = [frame for each in episodes for frame in each]
    columns = {name: [row[name] for row in rows] for name in ("image", "instruction", "action")}
    features = Features({"image": Image(), "instruction": Value("string"), "action": List(Value("float32"))})
    path.mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet", batch_size=16)


@pytest.mark.parametrize("write_format", [write_lerobot, write_rlds, store_images_in_parquet])
@pytest.mark.parametrize("streaming", [True, False])
def test_threads_that_read_the_same_frames_do_not_disturb_one_another(numbered, tmp_path, write_format, streaming):
    write_format(numbered, tmp_path / "numbered")
    frames = load(tmp_path / "numbered", streaming=streaming)
    numbers = list(range(np.prod(SHOWN)))

    def read(start):
        take(frames, start)
        return [(shown(frame["image"]), int(frame["action"][0])) for _ in range(2) for frame in frames]

    starts = [0, 0, 100, 200]
    for read_numbers in run_threads(*(partial(read, start) for start in starts)):
        assert read_numbers == [(number, number) for _ in range(2) for number in numbers]


def test_datasets_reads_several_streams_ahead_in_threads(numbered, tmp_path):
    write_lerobot(numbered, tmp_path / "numbered")
    stream = load(tmp_path / "numbered", streaming=True)
    episodes, steps = SHOWN
    parts = [stream.shard(episodes, index).repeat(3) for index in range(episodes)]
    order = [shown(frame["image"]) for frame in interleave_datasets(parts, stopping_strategy="all_exhausted")]
    assert order == [number + steps * index for _ in range(3) for number in range(steps) for index in range(episodes)]


def test_a_stream_that_is_being_read_can_be_sent_to_another_process(numbered, tmp_path):
    write_lerobot(numbered, tmp_path / "numbered")
    stream = load(tmp_path / "numbered", streaming=True)
    take(stream, 50)
    copy = pickle.loads(pickle.dumps(stream))
    assert [shown(frame["image"]) for frame in take(copy, 50)] == list(range(50))


def test_a_stream_without_frames_is_refused_in_training():
    with pytest.raises(ValueError, match="no frames"):
        next(iter(TrainingStream(from_episodes(lambda: [], streaming=True))))


def test_a_plain_stream_is_shared_evenly_too():
    columns = {"episode_index": [0] * 40, "frame_index": list(range(40)), "image": [None] * 40}
    stream = Dataset.from_dict(columns | {"instruction": ["push"] * 40}).to_iterable_dataset(num_shards=2)
    drawn = Counter(key for rank in range(3) for key in keys(take(TrainingStream(stream, rank, 3), 80)))
    assert len(drawn) == 40
    assert set(drawn.values()) == {6}
    np.testing.assert_array_equal(sorted(drawn), [(0, frame) for frame in range(40)])


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_ranks_evaluate_every_frame_once_and_equal_numbers_of_frames(write, decoded, readers):
    stream = load(write(10, 5), streaming=True)
    shares = [keys(EvaluationStream(stream, rank, readers)) for rank in range(readers)]
    assert {len(share) for share in shares} == {-(-15 // readers)}
    drawn = Counter(itertools.chain.from_iterable(shares))
    repeated = drawn - Counter(drawn.keys())
    assert len(drawn) == 15
    assert set(repeated) <= {(0, 0)}
    assert len(decoded) == 15 + repeated.total()


def test_workers_evaluate_each_stream_of_a_mixture_once(write):
    one, other = (load(write(6, 6, name=name), streaming=True) for name in ("one", "other"))
    mixture = EvaluationStream(mix([(one, 1.0, 12), (other, 5.0, 12)]))
    loader = DataLoader(mixture, batch_size=4, num_workers=2, collate_fn=keys)
    assert Counter(key for batch in loader for key in batch) == {
        (episode, frame): 2 for episode in range(2) for frame in range(6)
    }


@pytest.fixture
def damaged(make_episode):
    """Make a stream in which the first frame and one in the middle can't be read."""

    def read_damaged_chunk():
        raise OSError("the chunk is damaged")

    episodes = [make_episode(0), make_episode(1)]
    episodes[0][0]["image"] = episodes[1][2]["image"] = read_damaged_chunk
    return from_episodes(lambda: episodes, streaming=True, skip_bad_episodes=1.0)


@pytest.mark.parametrize("readers", [1, 3])
def test_ranks_evaluate_equal_numbers_of_frames_if_the_first_is_damaged(damaged, readers):
    shares = [keys(EvaluationStream(damaged, rank, readers)) for rank in range(readers)]
    assert {len(share) for share in shares} == {12 // readers}
    undamaged = {(index, step) for index in range(2) for step in range(6)} - {(0, 0), (1, 2)}
    assert set(itertools.chain(*shares)) == undamaged


def test_evaluation_on_damaged_frames_alone_is_refused(damaged):
    one = FrameStream(damaged.rows.take(1), "one", losses=damaged.losses)
    with pytest.raises(ValueError, match="Every frame of the stream is damaged"):
        list(EvaluationStream(one))


def test_training_resumes_exactly_where_damaged_frames_are_skipped(damaged):
    straight = keys(take(TrainingStream(damaged), 30))
    for used in range(1, 30):
        resumed = TrainingStream(damaged)
        resumed.first_batch = used
        assert keys(take(resumed, 30)[used:]) == straight[used:]
