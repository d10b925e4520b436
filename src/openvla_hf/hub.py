"""A policy becomes a repository of the Hub."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

# HTTPError is of the HTTP library, which is another one in other versions of the client.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from .checkpoint_info import ADAPTER_CONFIG, CheckpointInfo, describe
from .model_card import RUN_FILES, is_hub_id, write_card
from .modeling.configuration_openvla import MINIMUM_TRANSFORMERS
from .modeling.modeling_openvla import OpenVLAForActionPrediction
from .processing.processing_openvla import OpenVLAProcessor


README, REQUIREMENTS = "README.md", "requirements.txt"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
REFUSALS = {
    401: "it does not know the token; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; take one with the right to write, or push to a repository of your own",
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

    The card is made from the checkpoint and, where a folder has them, from `training.json`, `evaluation.json` (what
    `openvla-hf evaluate --json` prints) and `quantization.json`; these three stay where they are. Weights files that
    the repository holds already are replaced. An upload that broke off is resumed by the same call: files that have
    arrived are not sent again, and nothing can be seen before all have.

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
        ValueError: A model came without its processor, an adapter's base is a folder, weights are no safetensors, or a
            file would tell a token or a local path.
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
        raise ValueError(f"{folder} is no folder: give a model, or the folder that `save_pretrained` wrote.")
    if (token or get_token()) is None:
        raise OSError("Pushing takes a token with the right to write: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token, library_name="openvla-hf")
    if "/" not in repo_id:
        with _in_a_sentence(repo_id):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    info = describe(folder)
    texts = _read_texts(folder, info, base_model)
    texts[REQUIREMENTS] = _requirements(info)
    texts[README] = write_card(
        folder, info, repo_id, base_model=base_model, datasets=datasets, license=license, token=token
    )
    for name, text in texts.items():
        _refuse_secrets(name, text, folder, token or get_token())
    binaries = [name for name in info.files if fnmatch(name, "*.safetensors") or name == "tokenizer.model"]
    additions = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    additions += [CommitOperationAdd(name, folder / name) for name in binaries]
    added = {operation.path_in_repo for operation in additions}
    with _in_a_sentence(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
        stale = [name for name in there if name not in added and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
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
        raise OSError(f"{repo_id} can't be pushed while HF_HUB_OFFLINE is set: unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = REFUSALS.get(status) or error.server_message or type(error).__name__
        raise OSError(f"The Hub refused {repo_id} ({status}): {reason}.") from error
    except HTTPError as error:
        raise OSError(
            f"{constants.ENDPOINT} can't be reached ({error}): check the network and push again, what has arrived is "
            "kept."
        ) from error
    except RuntimeError as error:  # what the client raises when a large file can't be sent
        raise OSError(
            f"The upload to {repo_id} broke off ({error.__cause__ or error}): push again, what has arrived is kept."
        ) from error


def _read_texts(folder: Path, info: CheckpointInfo, base_model: str | None) -> dict[str, str]:
    """Configs, tokenizer and code, as they are to be pushed."""
    kept = ("*.json", "*.py", "*.jinja")
    left = (*RUN_FILES, "trainer_state.json")
    names = [name for name in info.files if any(fnmatch(name, pattern) for pattern in kept) and name not in left]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    if info.base_model is not None:
        base_model = base_model or info.base_model
        if not is_hub_id(base_model):
            raise ValueError(
                f"The adapter's base is the folder {base_model}, which nobody else has: give its Hub id as base_model."
            )
        adapter = json.loads(texts[ADAPTER_CONFIG]) | {"base_model_name_or_path": base_model}
        texts[ADAPTER_CONFIG] = json.dumps(adapter, indent=2) + "\n"
    return texts


def _requirements(info: CheckpointInfo) -> str:
    """What the checkpoint needs; its configuration says the same of transformers when it is too old."""
    needs = [f"transformers>={'.'.join(map(str, MINIMUM_TRANSFORMERS))}", "torch", "numpy", "pillow", "accelerate"]
    needs += ["peft"] if info.layout == "adapter" else []
    needs += [info.quantization.split()[0]] if info.quantization else []
    needs += [] if info.has_code else ["openvla-hf"]
    return "\n".join(needs) + "\n"


def _refuse_secrets(name: str, text: str, folder: Path, token: str | None) -> None:
    """Nothing of whoever pushes goes along: a token, or where things are on this computer."""
    if re.search(r"\bhf_[A-Za-z0-9]{16,}", text) or (token is not None and token in text):
        raise ValueError(f"{name} holds an access token: remove it, and revoke it if it was ever shared.")
    for path in {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve().parent}:
        if len(path.parts) > 1 and (match := re.search(rf"(?<![\w.]){re.escape(str(path))}(?![\w-])[^\s\"',]*", text)):
            raise ValueError(f"{name} names the local path {match[0]}: remove it, or give a Hub id in its place.")


__all__ = ["push"]
