"""The private parts of `datasets` that this package uses, all of them in `datasets_internals`."""

import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets

from openvla_hf.data.datasets_internals import constructor_arguments, drop_repeats, fingerprint


@pytest.fixture
def table():
    return Dataset.from_dict({"number": [10, 11, 12]})


def test_a_fingerprint_changes_with_the_content_alone(table):
    assert isinstance(table._fingerprint, str), "Dataset._fingerprint no longer names a table's content."
    assert fingerprint(table.select([0, 1])) == fingerprint(table.select([0, 1])) != fingerprint(table.select([0, 2]))


def test_rows_that_a_table_draws_again_are_dropped(table):
    drawn = table.select([2, 0, 2, 0])
    assert drawn._indices is not None, "Dataset._indices no longer holds the numbers of the selected rows."
    assert sorted(drop_repeats(drawn)["number"]) == [10, 12]
    assert drop_repeats(table)["number"][:] == [10, 11, 12]
    mixed = concatenate_datasets([table.select([0, 0]), table.select([1])])
    assert sorted(drop_repeats(mixed)["number"]) == [10, 11]


def test_a_subclass_of_a_stream_is_made_from_another_stream(table):
    stream = table.to_iterable_dataset(num_shards=3)
    assert hasattr(stream, "_ex_iterable"), "IterableDataset no longer keeps its examples in _ex_iterable."
    made = IterableDataset(**constructor_arguments(stream))
    assert list(made) == list(stream)
    assert made.num_shards == 3
