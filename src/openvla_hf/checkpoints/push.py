"""Push a policy to the Hub."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

# HTTPError comes from the HTTP library, which differs between versions of the client.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..modeling.checkpoint_files import ADAPTER_CONFIG
from ..modeling.configuration_openvla import MINIMUM_TRANSFORMERS
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from .describe import CheckpointInfo, describe
from .model_card import is_hub_id, write_card
from .shared_files import WEIGHTS_FILE, find_binaries, read_text_in, read_texts, refuse_secrets


README, REQUIREMENTS, CONFIGURATION_FILE = "README.md", "requirements.txt", "configuration_openvla.py"
PUSH_REFUSALS = {
    401: "the token is not valid. Log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access there. Use a token with write access, or push to a repository of your own",
}


def push(
    checkpoint: OpenVLAForActionPrediction | str | os.PathLike,
    repo_id: str,
    *,
    processor: OpenVLAProcessor | None = None,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload OpenVLA policy",
    max_shard_size: str = "5GB",
    token: str | None = None,
) -> CommitInfo:
    """Push a policy or an adapter to the Hub: weights, processor, code, statistics and model card in one commit.

    Only files with the usual names in a checkpoint are pushed (see `shared_files`). The code is always that of this
    package, as `save_pretrained` writes it. The model card is made from the checkpoint and, if the folder has them,
    from `training.json`, `evaluation.json` (the output of `openvla-hf evaluate --json`) and `quantization.json`;
    these three files are not pushed. Weights files that are already in the repository are replaced. To resume an
    interrupted upload, call `push` again: files that have arrived are not sent again, and nothing becomes visible
    before all files have arrived.

    Args:
        checkpoint: A model, or the folder of a saved model or adapter.
        repo_id: Hub id such as "someone/openvla-7b-kitchen". The repository is created if it does not exist.
        processor: Processor of a model. A folder has its own.
        base_model: Hub id of the base model. Defaults to the one that the adapter or `training.json` names.
        datasets: Hub ids of the training data. Defaults to those in `training.json`.
        license: License. Defaults to that of the base model.
        private: Whether a new repository is private. Defaults to the setting of the account or organisation.
        revision: Branch to push to, created if it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit message.
        max_shard_size: Largest size of a weights file of a model. The files of a folder stay as they are.
        token: Token with write access. Defaults to the stored one.

    Returns:
        The commit or pull request.

    Raises:
        ValueError: A model has no processor; an adapter's base model is a local folder; weights are incomplete or not
            in safetensors files with their usual names; or a file contains a token, a key or a local path, links to a
            file outside the folder, has metadata in the header of its weights, or needs other code.
        OSError: There is no token, the Hub refused it, or the Hub could not be reached.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        if processor is None:
            raise ValueError("A model cannot be pushed without its processor: pass `processor=`.")
        with tempfile.TemporaryDirectory() as saved:
            checkpoint.save_pretrained(saved, max_shard_size=max_shard_size)
            processor.save_pretrained(saved)
            return push(
                saved,
                repo_id,
                base_model=base_model,
                datasets=datasets,
                license=license,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give a model, or the folder that `save_pretrained` wrote.")
    token = token or get_token()
    if token is None:
        raise OSError("Pushing needs a token with write access. Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token, library_name="openvla-hf")
    repo_id = _with_owner(repo_id, api)
    card = {"base_model": base_model, "datasets": datasets, "license": license, "token": token}
    additions = _collect(folder, repo_id, card)
    with _in_a_sentence(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = _stale_weights(api.list_repo_files(repo_id, revision=None if create_pr else revision), additions)
        return api.create_commit(
            repo_id,
            [*additions, *stale],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _with_owner(repo_id: str, api: HfApi) -> str:
    """Add the name of the account to a repository's name without an owner."""
    if "/" in repo_id:
        return repo_id
    with _in_a_sentence(repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


def _collect(folder: Path, repo_id: str, card: dict[str, Any]) -> list[CommitOperationAdd]:
    """Collect the files to push, and check them for secrets.

    Args:
        folder: Folder of the checkpoint.
        repo_id: Hub id of the repository.
        card: Arguments of `write_card`.
    """
    info = describe(folder)
    if info.layout == "openvla-oft":
        raise ValueError(
            f"{folder} has weights in pickled files, which are not pushed. Load it with `from_pretrained`, save it "
            "with `save_pretrained`, and push the saved checkpoint."
        )
    texts = read_texts(folder, info)
    base = card["base_model"] or info.base_model
    if info.layout == "adapter" and base is not None:
        texts[ADAPTER_CONFIG] = _with_base(texts[ADAPTER_CONFIG], base)
    info = replace(info, has_code=CONFIGURATION_FILE in texts)
    texts[REQUIREMENTS] = _requirements(info)
    texts[README] = write_card(folder, info, repo_id, **card)
    binaries = find_binaries(folder, info)
    for name, text in (texts | {name: read_text_in(folder / name) for name in binaries}).items():
        refuse_secrets(name, text, folder, card["token"])
    additions = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    return additions + [CommitOperationAdd(name, folder / name) for name in binaries]


def _stale_weights(there: list[str], additions: list[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """Find the weights files in the repository that the commit does not replace."""
    added = {addition.path_in_repo for addition in additions}
    weights = [name for name in there if WEIGHTS_FILE.fullmatch(name) or name == SAFE_WEIGHTS_INDEX_NAME]
    return [CommitOperationDelete(name) for name in weights if name not in added]


@contextmanager
def _in_a_sentence(repo_id: str) -> Iterator[None]:
    """Convert errors of the Hub's client to an `OSError` that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError(f"Cannot push {repo_id} while HF_HUB_OFFLINE is set. Unset it and push again.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = PUSH_REFUSALS.get(status) or error.server_message or type(error).__name__
        raise OSError(f"The Hub refused {repo_id} ({status}): {reason}.") from error
    except HTTPError as error:
        raise OSError(
            f"Cannot reach {constants.ENDPOINT} ({error}). Check the network and push again: uploaded files are kept."
        ) from error
    except RuntimeError as error:  # the client could not send a large file
        raise OSError(
            f"The upload to {repo_id} failed ({error.__cause__ or error}). Push again: uploaded files are kept."
        ) from error


def _with_base(adapter_config: str, base_model: str) -> str:
    """Write the Hub id of the base model into the config of an adapter."""
    if not is_hub_id(base_model):
        raise ValueError(f"The adapter's base model {base_model!r} is not a Hub id. Pass its Hub id as `base_model`.")
    return json.dumps(json.loads(adapter_config) | {"base_model_name_or_path": base_model}, indent=2) + "\n"


def _requirements(info: CheckpointInfo) -> str:
    """List the packages that the checkpoint needs."""
    needs = [f"transformers>={'.'.join(map(str, MINIMUM_TRANSFORMERS))}", "torch", "numpy", "pillow", "accelerate"]
    needs += ["peft"] if info.layout == "adapter" else []
    needs += [info.quantization.split()[0]] if info.quantization else []
    needs += [] if info.has_code else ["openvla-hf"]
    return "\n".join(needs) + "\n"


__all__ = ["push"]
