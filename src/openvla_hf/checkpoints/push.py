"""A policy becomes a repository of the Hub."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

# HTTPError is of the HTTP library, which is another one in other versions of the client.
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
REFUSALS = {
    401: "the token is not valid. Log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there. Use a token with write access, or push to a repository of your own",
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
    """Push a policy, or an adapter of one, to the Hub: weights, processor, code, statistics and card in one commit.

    Files of a folder are chosen by their names (`shared_files`), and the others stay where they are. The code is
    always this package's own, as `save_pretrained` writes it. The card is made from the checkpoint and, where a
    folder has them, from `training.json`, `evaluation.json` (what `openvla-hf evaluate --json` prints) and
    `quantization.json`, which are not pushed. Weights files that the repository holds already are replaced. An
    upload that broke off is resumed by the same call: files that have arrived are not sent again, and nothing can
    be seen before all have.

    Args:
        checkpoint: A model, or the folder of a saved one or of an adapter.
        repo_id: Such as "someone/openvla-7b-kitchen"; it is made if it does not exist.
        processor: Of a model; a folder has its own.
        base_model: Hub id of what was fine-tuned; by default the one that an adapter or `training.json` names.
        datasets: Hub ids of what it was trained on; by default those of `training.json`.
        license: By default that of the base model.
        private: Whether a new repository is private; by default as the account or organisation wants it.
        revision: Branch, made if it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        max_shard_size: Of one weights file of a model; a folder's stay as they are.
        token: With the right to write; the stored one by default.

    Raises:
        ValueError: A model came without its processor, an adapter's base is a folder, weights are incomplete or not in
            safetensors files under their usual names, or a file holds a token, a key or a local path, is a link that
            leads out of the folder, has metadata in the header of its weights, or needs foreign code.
        OSError: There is no token, the Hub refused it, or it could not be reached.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        if processor is None:
            raise ValueError("A model needs its processor to act: push(model, repo_id, processor=processor).")
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
    if (token or get_token()) is None:
        raise OSError("Pushing needs a token with write access. Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token, library_name="openvla-hf")
    if "/" not in repo_id:
        with _in_a_sentence(repo_id):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    info = describe(folder)
    texts = read_texts(folder, info)
    base = base_model or info.base_model
    if info.layout == "adapter" and base is not None:
        texts[ADAPTER_CONFIG] = _with_base(texts[ADAPTER_CONFIG], base)
    info = replace(info, has_code=CONFIGURATION_FILE in texts)
    texts[REQUIREMENTS] = _requirements(info)
    texts[README] = write_card(
        folder, info, repo_id, base_model=base_model, datasets=datasets, license=license, token=token
    )
    binaries = find_binaries(folder, info)
    for name, text in (texts | {name: read_text_in(folder / name) for name in binaries}).items():
        refuse_secrets(name, text, folder, token or get_token())
    additions = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    additions += [CommitOperationAdd(name, folder / name) for name in binaries]
    added = {operation.path_in_repo for operation in additions}
    with _in_a_sentence(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
        weights = [name for name in there if WEIGHTS_FILE.fullmatch(name) or name == SAFE_WEIGHTS_INDEX_NAME]
        stale = [name for name in weights if name not in added]
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


@contextmanager
def _in_a_sentence(repo_id: str) -> Iterator[None]:
    """What goes wrong between here and the Hub, as an `OSError` that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id} can't be pushed while HF_HUB_OFFLINE is set. Unset it and push again.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = REFUSALS.get(status) or error.server_message or type(error).__name__
        raise OSError(f"The Hub refused {repo_id} ({status}): {reason}.") from error
    except HTTPError as error:
        raise OSError(
            f"{constants.ENDPOINT} can't be reached ({error}). Check the network and push again: uploaded files "
            "are kept."
        ) from error
    except RuntimeError as error:  # what the client raises when a large file can't be sent
        raise OSError(
            f"The upload to {repo_id} failed ({error.__cause__ or error}). Push again: uploaded files are kept."
        ) from error


def _with_base(adapter_config: str, base_model: str) -> str:
    """The config of an adapter, with the Hub id of its base."""
    if not is_hub_id(base_model):
        raise ValueError(
            f"The adapter's base is {base_model!r}, which is not a Hub id. Give the base's Hub id as base_model."
        )
    return json.dumps(json.loads(adapter_config) | {"base_model_name_or_path": base_model}, indent=2) + "\n"


def _requirements(info: CheckpointInfo) -> str:
    """What the checkpoint needs; its configuration says the same of transformers when it is too old."""
    needs = [f"transformers>={'.'.join(map(str, MINIMUM_TRANSFORMERS))}", "torch", "numpy", "pillow", "accelerate"]
    needs += ["peft"] if info.layout == "adapter" else []
    needs += [info.quantization.split()[0]] if info.quantization else []
    needs += [] if info.has_code else ["openvla-hf"]
    return "\n".join(needs) + "\n"


__all__ = ["push"]
