"""Complete checkpoints: each is written to a temporary folder, which is renamed when all of its files are there.

transformers has no public way to choose where `Trainer` writes a checkpoint, so this module overrides four of its
private methods (`OVERRIDDEN`). No other module does. `tests/training/test_trainer_internals.py` fails when a version
of transformers changes them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..modeling.folder_writing import UNFINISHED, written_whole


OVERRIDDEN = ("_get_output_dir", "_push_from_checkpoint", "_save", "_save_checkpoint")


class WholeCheckpointTrainer(Trainer):
    """A `Trainer` that writes complete checkpoints, with the files that `write_policy` writes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.writes_aside = False

    def write_policy(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write all files that the policy needs into an empty folder.

        Args:
            folder: Folder to write into.
            state_dict: Weights that were gathered from several processes; those of the model by default. If it is
                empty, the files are written without weights.
        """
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy. In a checkpoint of a run with FSDP2, each process writes its shards of the weights itself.

        Outside of checkpoints, the shards are gathered, so that the weights are ordinary safetensors.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
            super().save_model(output_dir, _internal_call)
        elif self.writes_aside:
            self._save(output_dir, state_dict={})
            self.accelerator.wait_for_everyone()  # `Trainer` adds the shards to the folder that this created
        else:
            plugin.set_state_dict_type("FULL_STATE_DICT")
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                plugin.set_state_dict_type("SHARDED_STATE_DICT")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the policy. `Trainer.save_model` calls this after it has gathered weights that processes shard."""
        if self.args.should_save:
            with written_whole(output_dir or self.args.output_dir) as folder:
                self.write_policy(folder, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the parent folder of the checkpoints, which `Trainer._save_checkpoint` asks for."""
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self.writes_aside else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let `Trainer` save the checkpoint in a temporary folder, then give the folder its name."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, final = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.writes_aside = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # raised by file writers on a full disk
            raise OSError(
                f"{final} can't be written ({error.__cause__ or error}). Free some disk space and resume: the earlier "
                "checkpoints are complete."
            ) from error
        finally:
            self.writes_aside = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(aside):  # in every process: each loads it at the end
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            if final.exists():  # from a run that was resumed at an earlier checkpoint
                final.rename(run_dir / UNFINISHED / "replaced")
            aside.rename(final)
            shutil.rmtree(run_dir / UNFINISHED)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing yet: `Trainer._save_checkpoint` calls this before the checkpoint has its name."""


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest complete checkpoint of a run, or `None` if there is none."""
    steps = {
        int(number): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rsplit("-", 1)[1]).isdigit() and (path / TRAINER_STATE_NAME).is_file()
    }
    return str(steps[max(steps)]) if steps else None


def read_state(checkpoint: str | os.PathLike) -> TrainerState:
    """Read the state of a run at a checkpoint: its step (`global_step`) and its log (`log_history`)."""
    return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))


__all__ = ["WholeCheckpointTrainer", "last_checkpoint", "read_state"]
