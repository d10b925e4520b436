"""The undocumented parts of transformers and accelerate on which training relies."""

import inspect

import pytest
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer, TrainerCallback

from openvla_hf.training.checkpoint_saving import OVERRIDDEN, WholeCheckpointTrainer


PARAMETERS = {
    "_get_output_dir": ["self", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trainer_still_has_the_private_methods_that_are_overridden(name):
    told = f"transformers has changed Trainer.{name}: adapt openvla_hf/training/checkpoint_saving.py to it."
    assert hasattr(Trainer, name), told
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == PARAMETERS[name], told


@pytest.mark.parametrize(
    ("caller", "called"),
    [
        ("_save_checkpoint", "self._get_output_dir("),
        ("_save_checkpoint", "self.save_model(output_dir, _internal_call=True)"),
        ("_save_checkpoint", "self._push_from_checkpoint("),
        ("save_model", "self._save("),
    ],
)
def test_trainer_still_calls_them(caller, called):
    source = inspect.getsource(getattr(Trainer, caller))
    assert called in source, (
        f"Trainer.{caller} of transformers no longer calls {called}: adapt openvla_hf/training/checkpoint_saving.py."
    )


def test_nothing_else_of_trainer_is_overridden_in_private():
    from openvla_hf.training.trainer import ActionTrainer

    theirs = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    ours = {name for one in (ActionTrainer, WholeCheckpointTrainer) for name in vars(one) if name in theirs}
    assert ours == set(OVERRIDDEN)


def test_accelerate_still_prepares_a_loader_that_each_process_has_to_itself():
    parameters = inspect.signature(prepare_data_loader).parameters
    for name in ("num_processes", "process_index", "put_on_device", "dispatch_batches"):
        assert name in parameters, (
            f"accelerate.data_loader.prepare_data_loader no longer takes {name}: adapt ActionTrainer._prepare_stream."
        )


def test_transformers_still_calls_callbacks_before_the_optimizers_step():
    told = "transformers no longer calls on_pre_optimizer_step: adapt ActionTrainer.check_step, which finds NaN."
    assert hasattr(TrainerCallback, "on_pre_optimizer_step"), told
