import numpy as np
import pytest
import torch

from openvla_hf import ActionTokenizer
from openvla_hf.modeling.action_tokenizer import (
    action_dim,
    check_action_stats,
    check_statistics,
    normalize,
    resolve_action_stats,
    unnormalize,
)


STATS = {
    "mean": [0.0, 1.0, 0.5],
    "std": [1.0, 2.0, 0.5],
    "min": [-2.0, 0.0, 0.0],
    "max": [2.0, 4.0, 1.0],
    "q01": [-1.0, 1.0, 0.0],
    "q99": [1.0, 3.0, 1.0],
    "mask": [True, True, False],
}


@pytest.mark.parametrize("tokenizer", [ActionTokenizer(), ActionTokenizer(vocab_end=500, n_bins=64)])
def test_decoding_is_within_half_a_bin(tokenizer):
    actions = np.linspace(-1, 1, 1001).reshape(7, 11, 13)
    ids = tokenizer.encode(actions)
    assert (ids.shape, ids.dtype) == (actions.shape, np.int64)
    assert ids.min() == tokenizer.first_id
    assert ids.max() == tokenizer.vocab_end - 1
    assert np.abs(tokenizer.decode(ids) - actions).max() <= 1 / (tokenizer.n_bins - 1) + 1e-12
    # The highest action shares the last centre, so its id is the only one that changes.
    moved = tokenizer.encode(tokenizer.decode(ids)) != ids
    assert (ids[moved] == tokenizer.first_id).all()


def test_ids_count_down_and_bins_count_up():
    tokenizer = ActionTokenizer()
    assert tokenizer.encode(np.array([-1.0, 1.0, -7.0, 7.0])).tolist() == [31999, 31744, 31999, 31744]
    assert tokenizer.decode(np.array([31872])) == 0.0
    assert tokenizer.bin_values.shape == (256,)
    assert (np.diff(tokenizer.bin_values)[:-1] > 0).all()
    assert tokenizer.bin_values[0] == tokenizer.decode(31999)


def test_ids_that_are_not_actions_are_clipped_to_an_end():
    tokenizer = ActionTokenizer()
    expected = tokenizer.decode(np.array([31744, 31999]))
    assert np.array_equal(tokenizer.decode(torch.tensor([2, 32063])), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_have_no_id(value):
    with pytest.raises(ValueError, match="must be finite"):
        ActionTokenizer().encode(np.array([0.0, value]))


def test_unnormalising_scales_the_masked_dimensions():
    actions = np.array([[-1.0, 1.0, 0.3]])
    assert unnormalize(actions, STATS).tolist() == [[-1.0, 3.0, 0.3]]
    whole = {name: value for name, value in STATS.items() if name != "mask"}
    assert unnormalize(actions, whole).tolist() == [[-1.0, 3.0, 0.65]]
    assert action_dim(STATS) == 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bounds_q99", [0.5, 1.0, 0.3]), ("bounds", [0.25, 0.75, 0.3]), ("normal", [0.5, 1.25, 0.3])],
)
def test_kinds_of_normalisation(kind, expected):
    assert normalize(np.array([0.5, 3.5, 0.3]), STATS, kind) == pytest.approx(expected, abs=1e-7)


def test_a_dimension_that_never_changes_becomes_zero():
    still = STATS | {"min": [0.3, 0.0, 1.0], "max": [0.3, 4.0, 1.0]}
    assert normalize(np.array([0.3, 2.0, 1.0]), still).tolist()[::2] == [0.0, 0.0]
    assert normalize(np.array([0.3, 2.0, 1.0]), still, "normal")[2] == 1.0


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="Unknown normalisation 'minmax': give 'bounds_q99', 'bounds' or 'normal'"):
        normalize(np.zeros(3), STATS, "minmax")


@pytest.mark.parametrize("token_ids", [[np.nan], [31900.0], [True], ["31900"], []])
def test_ids_that_are_not_integers_are_refused(token_ids):
    with pytest.raises(ValueError, match="Ids of action tokens must be integers, got "):
        ActionTokenizer().decode(np.array(token_ids))


def test_small_integer_ids_do_not_overflow():
    tokenizer = ActionTokenizer(vocab_end=300)
    assert np.array_equal(tokenizer.decode(np.array([44, 255], "u1")), tokenizer.decode(np.array([44, 255])))


def test_the_only_statistics_need_no_key():
    assert resolve_action_stats({"lab": {"action": STATS}}, None) is STATS


SEVERAL = {"bridge_orig": {"action": STATS}, "fractal": {"action": STATS}}


@pytest.mark.parametrize(
    ("norm_stats", "key", "message"),
    [
        (SEVERAL, None, "several action statistics: pass `unnorm_key=`, one of 'bridge_orig', 'fractal'"),
        (
            SEVERAL,
            "bridge",
            "Unknown `unnorm_key` 'bridge'. Did you mean 'bridge_orig'.* from 'bridge_orig', 'frac",
        ),
        (SEVERAL, "xyz", "Unknown `unnorm_key` 'xyz'. Choose from 'bridge_orig', 'fractal'"),
        ({}, None, "no action statistics.*put a `dataset_statistics.json` next to.*or pass `stats=`"),
        (None, "bridge_orig", "no action statistics"),
    ],
)
def test_statistics_that_are_not_found_say_what_to_do(norm_stats, key, message):
    with pytest.raises(ValueError, match=message):
        resolve_action_stats(norm_stats, key)


GOOD = {"q01": [-1.0, 0.0], "q99": [1.0, 0.0], "min": [-2, 0], "max": [2, 0], "mask": [True, False]}


@pytest.mark.parametrize(
    "stats",
    [
        GOOD,
        {"q01": [0.0], "q99": [0.0]},
        {name: np.array(values) for name, values in GOOD.items()},
        {name: torch.tensor(values) for name, values in GOOD.items()},
        GOOD | {"mask": [1, 0], "names": ["a", "b"]},
    ],
)
def test_statistics_of_every_usual_form_pass(stats):
    assert check_action_stats(stats, "stats") is stats
    assert check_statistics({"kitchen": {"action": stats, "proprio": {"q01": None}, "num_transitions": 3}}, "x")
    assert check_statistics(None, "x") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": [float("nan"), 0.0]}, "'q01' must be a list of finite numbers"),
        ({"q99": [float("inf"), 0.0]}, "'q99' must be a list of finite numbers"),
        ({"q99": [10**400, 0.0]}, "'q99' must be a list of finite numbers"),
        ({"q01": [None, 0.0]}, "'q01' must be a list of finite numbers"),
        ({"q01": ["0.1", 0.0]}, "'q01' must be a list of finite numbers"),
        ({"q01": 0.5}, "'q01' must be a list of finite numbers"),
        ({"q01": [[0.0], [0.0, 1.0]]}, "'q01' must be a list of finite numbers"),
        ({"min": [-2, float("nan")]}, "'min' must be a list of finite numbers"),
        ({"std": None}, "'std' must be a list of finite numbers"),
        ({"q01": [2.0, 0.0]}, "'q01' is above 'q99' in dimension 0"),
        ({"max": [2, -1]}, "'min' is above 'max' in dimension 1"),
        ({"q99": [1.0]}, "'q99' has 1 values, but 'q01' has 2"),
        ({"q99": 1.0}, "'q99' must be a list"),
        ({"q01": [], "q99": []}, "'q01' is empty"),
        ({"q01": [-1e308, 0.0], "q99": [1e308, 1.0]}, "'q01' and 'q99' are too far apart in dimension 0"),
        ({"q99": [10**400, 1.0]}, "'q99' must be a list of finite numbers"),
        ({"std": [0.1, -0.1]}, "'std' must not be negative"),
        ({"mask": [True]}, "'mask' has 1 values, but 'q01' has 2"),
        ({"mask": ["False", "True"]}, "'mask' must be a list of truth values"),
        ({"mask": [2, 1]}, "'mask' must be a list of truth values"),
        ({"mask": None}, "'mask' must be a list of truth values"),
    ],
)
def test_damaged_statistics_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"^a file, 'action' of 'kitchen': {message}"):
        check_statistics({"kitchen": {"action": GOOD | change}}, "a file")


@pytest.mark.parametrize("missing", ["q01", "q99"])
def test_statistics_without_a_bound_are_refused(missing):
    stats = {name: values for name, values in GOOD.items() if name != missing}
    with pytest.raises(ValueError, match=f"^`stats`: '{missing}' is missing .found 'q"):
        check_action_stats(stats, "`stats`")
    with pytest.raises(ValueError, match=r"'q01' is missing .found nothing"):
        check_action_stats({}, "`stats`")


@pytest.mark.parametrize("norm_stats", [[], "bridge", {"kitchen": GOOD}, {"kitchen": None}])
def test_statistics_that_are_something_else_are_refused(norm_stats):
    with pytest.raises(
        ValueError, match=r"^a file (must map names of datasets|has no 'action' statistics for 'kitchen')"
    ):
        check_statistics(norm_stats, "a file")
