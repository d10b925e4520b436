import numpy as np
import pytest

from openvla_hf.serving.safety import SafetyLimits, UnsafeAction


LIMITS = SafetyLimits(max_translation=0.05, max_rotation=0.2, low=(-0.3, -0.3, 0.0), high=(0.3, 0.3, 0.4))
MIDDLE = np.array([0.0, 0.0, 0.2])


def action(*values):
    return np.array([*values, *np.zeros(6 - len(values)), 1.0])


@pytest.mark.parametrize(
    ("unsafe", "position", "message"),
    [
        (action(0.04, 0.04), MIDDLE, r"moves by 0\.057 m; the limit is 0\.05 m"),
        (action(0, 0, 0, 0.2, 0.2), MIDDLE, r"rotates by 0\.283 rad; the limit is 0\.2 rad"),
        (action(0, 0, -0.03), [0, 0, 0.02], r"moves to \[0\.0, 0\.0, -0\.01\], outside the workspace"),
        (action(), [0, 0, 0.41], "end effector is at .*, outside the workspace"),
        (action(np.nan), MIDDLE, "not finite"),
        (action(), [0, 0, np.inf], "not finite"),
    ],
)
def test_an_action_beyond_a_limit_is_unsafe(unsafe, position, message):
    with pytest.raises(UnsafeAction, match=message):
        LIMITS.check(unsafe, position)


def test_clipping_keeps_safe_actions_and_makes_others_safe():
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.1, 10.0):
        for _ in range(100):
            wanted = np.append(rng.normal(size=6) * scale, 0.3)
            position = rng.uniform(LIMITS.low, LIMITS.high)
            safe = LIMITS.clip(wanted, position)
            LIMITS.check(safe, position)
            assert safe[6] == wanted[6]
            if scale == 0.01 and (np.abs(position - [0, 0, 0.2]) < [0.2, 0.2, 0.1]).all():
                np.testing.assert_allclose(safe, wanted, atol=1e-15)


def test_clipping_keeps_directions_inside_the_workspace():
    safe = LIMITS.clip(action(0.3, 0.4, 0, 0, 0, 2), MIDDLE)
    np.testing.assert_allclose(safe, action(0.03, 0.04, 0, 0, 0, 0.2), atol=1e-15)


def test_a_movement_out_of_the_workspace_ends_at_its_wall():
    safe = LIMITS.clip(action(0.03, 0, -0.03), [0, 0, 0.02])
    np.testing.assert_allclose(safe, action(0.03, 0, -0.02), atol=1e-15)


def test_clipping_repairs_neither_numbers_that_are_not_finite_nor_a_position_outside():
    with pytest.raises(UnsafeAction, match="not finite"):
        LIMITS.clip(action(np.nan), MIDDLE)
    with pytest.raises(UnsafeAction, match="Move it back"):
        LIMITS.clip(action(), [0, 0, -0.1])


def test_the_arguments_stay_as_they_are():
    wanted = action(1, 1, 1)
    LIMITS.clip(wanted, MIDDLE)
    np.testing.assert_array_equal(wanted, action(1, 1, 1))


def test_other_actions_and_other_limits_are_refused():
    with pytest.raises(ValueError, match="must have 7 dimensions"):
        LIMITS.check(np.zeros(14), MIDDLE)
    with pytest.raises(ValueError, match=r"`max_rotation` must be a finite number of at least 0, got -1"):
        SafetyLimits(0.1, -1, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        SafetyLimits(0.1, 0.1, (0, 0, 1), (1, 1, 0))
