"""Choose the files of a checkpoint that go to the Hub, and check that they contain no secrets."""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATISTICS_FILE, CheckpointFiles
from ..modeling.checkpoint_loading import refuse_foreign_files
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from .describe import CheckpointInfo
from .model_card import RUN_FILES
from .transformers_internals import custom_object_save


# Other files in a folder are not pushed, since they may be private.
TEXT_FILES = frozenset(
    (
        "config.json", "generation_config.json", ADAPTER_CONFIG, STATISTICS_FILE, SAFE_WEIGHTS_INDEX_NAME,
        "processor_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt",
    )
)  # fmt: skip
SENTENCEPIECE_FILE = "tokenizer.model"
WEIGHTS_FILE = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
# Classes whose code a repository needs, by layout. Published checkpoints name other classes.
SHIPPED_CLASSES: dict[str, tuple[type, ...]] = {
    "openvla-hf": (OpenVLAForActionPrediction, OpenVLAProcessor),
    "adapter": (OpenVLAProcessor,),
}

SECRETS = {
    "an access token of Hugging Face": r"\b(hf|api_org)_[A-Za-z0-9]{16,}",
    "an access token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "an access token of GitLab": r"\bglpat-[\w-]{16,}",
    "a key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a key of OpenAI or Anthropic": r"\bsk-[\w-]{20,}",
    "a key of Google": r"\bAIza[\w-]{30,}",
    "an access token of Slack": r"\bxox[a-z]-[\w-]{10,}",
    "an access token of npm": r"\bnpm_[A-Za-z0-9]{20,}",
    "an access token of PyPI": r"\bpypi-[\w-]{16,}",
    "an access token of Docker": r"\bdckr_pat_[\w-]{16,}",
    "an access token of Replicate": r"\br8_[A-Za-z0-9]{20,}",
    "a key of Stripe": r"\b[rs]k_(live|test)_[A-Za-z0-9]{10,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}",
    "a bearer token": r"(?i)\bbearer\s+(?=\S*\d)[\w.~+/=-]{16,}",
    "a URL with a password": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'{}<>]*:[^\s/@\"'{}<>]+@",
    "a key of Weights & Biases": r"(?i)\bwandb_v\d_\w{20,}|\bwandb[\w\"' :=.-]{0,40}\b[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password or key": r"(?i)(api_?(key|token)|secret|passw(or)?d|(access|auth)_?token)\w*\\*[\"']?\s*[:=]\s*"
    r"\\*[\"'][^\s\"']{12,}",
}
# The patterns that begin at a word, as one. Searching a text for each of them takes most of the time of a push.
WORD = r"\b"
SECRETS_AT_A_WORD = re.compile(
    WORD + f"(?:{'|'.join(each.removeprefix(WORD) for each in SECRETS.values() if each.startswith(WORD))})"
)
# Paths below folders that people work in. A single component such as "/tmp" may be a token of a tokenizer. On Windows,
# paths have two components below a drive or a server, and backslashes may be escaped.
LOCAL_PATH = re.compile(
    r"(?<![\w.])(?:"
    r"/(?:home|Users|root|mnt|media|tmp|var|private|Volumes|scratch|workspace|work|data|nfs|opt|srv|lustre|gpfs|storage"
    r"|cluster|content/drive|kaggle|dev/shm|run/user)/[^\s\"'/,][^\s\"',]*"
    r"|(?<![~/-])~/[\w.-][^\s\"',]*"
    r"|[A-Za-z]:(?:\\+|/(?!/))[^\\/:*?\"'<>|{}\r\n]+[\\/]+[\w.-][^\s\"',]*"
    r"|(?<!\\)\\{2,4}[A-Za-z][\w.-]+\\{1,2}[\w$.-]{2}[^\s\"',]*)"
)


def read_texts(folder: Path, info: CheckpointInfo) -> dict[str, str]:
    """Read the text files that go to the Hub, with the code of this package instead of the folder's.

    Raises:
        ValueError: A file is a link that leads out of the folder, is not text, or needs code that is not the
            package's.
    """
    names = [name for name in info.files if name in TEXT_FILES]
    for name in (*names, *(name for name in RUN_FILES if name in info.files)):
        _refuse_outside(folder, name)
    code = package_code(info.layout)
    texts = {name: _read_text(folder, name) for name in names}
    foreign = [name for name in info.files if name.endswith(".py") and name not in code]
    for name, text in texts.items():
        named = re.findall(r'"(?:[^"]*--)?(\w+)\.\w+"', "".join(re.findall(r'"auto_map"\s*:\s*\{[^}]*\}', text)))
        if needed := sorted({f"{module}.py" for module in named} & {*foreign}):
            raise ValueError(
                f"{name} needs the code in {needed[0]}, but only modules of openvla-hf are pushed. Check the files of "
                "the folder, and upload them with `hf upload`."
            )
    if foreign:
        warnings.warn(f"Not pushing {', '.join(foreign)}: only modules of openvla-hf are pushed.", stacklevel=3)
    changed = [name for name in code if name in info.files and _read_text(folder, name) != code[name]]
    if changed:
        warnings.warn(
            f"Pushing the code of the installed openvla-hf instead of the folder's {', '.join(changed)}, which "
            "differs.",
            stacklevel=3,
        )
    return texts | code


def find_binaries(folder: Path, info: CheckpointInfo) -> list[str]:
    """Find the names of the weights and of the SentencePiece model that go to the Hub.

    Raises:
        ValueError: A file is a link that leads out of the folder, there is no weights file with a usual name, or a
            file that the index names is not among them.
    """
    names = [name for name in info.files if name == SENTENCEPIECE_FILE or WEIGHTS_FILE.fullmatch(name)]
    for name in names:
        _refuse_outside(folder, name)
    files = CheckpointFiles.locate(folder)
    refuse_foreign_files(files)
    shards = set((files.read_json(SAFE_WEIGHTS_INDEX_NAME) or {"weight_map": {}})["weight_map"].values())
    if absent := sorted(shards.difference(names)):
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} names {absent[0]!r}, which is missing or has a name that is not pushed. Save "
            "the model again with `save_pretrained`."
        )
    needed = ADAPTER_WEIGHTS if info.layout == "adapter" else SAFE_WEIGHTS_NAME
    if needed not in names and (info.layout == "adapter" or not shards):
        raise ValueError(
            f"{folder} has no weights file with a usual name: {needed} is missing. Save the model again with "
            "`save_pretrained`, without `variant`."
        )
    return names


def read_text_in(path: Path) -> str:
    """Read the text in a binary file: the header of weights, or the whole of a SentencePiece model.

    Weights with unknown metadata in their header are refused. Removing the metadata would change the caller's folder
    or write gigabytes again, and `save_pretrained` never writes such metadata.

    Raises:
        ValueError: The metadata contains more than the format and, for weights of torchao, the fields to restore them.
    """
    if path.name == SENTENCEPIECE_FILE:
        return path.read_bytes().decode("latin-1")
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, list(file.keys())
    known = {"format", "tensor_names"}
    if "tensor_names" in metadata:  # of torchao: a list of tensors, each of which has a key
        known.update(re.findall(r'"([^"]+)"', metadata["tensor_names"]))
    if metadata.get("format", "pt") != "pt":
        known.remove("format")
    if unknown := sorted(metadata.keys() - known):
        raise ValueError(
            f"The header of {path.name} contains metadata {unknown[0]!r}, which is not pushed. Write the file again "
            'with safetensors.torch.save_file(load_file(path), path, metadata={"format": "pt"}).'
        )
    return json.dumps([metadata, names], ensure_ascii=False)


def refuse_secrets(name: str, text: str, folder: Path, token: str | None) -> None:
    """Raise `ValueError` if a text contains a token, a key or a local path."""
    searched = text
    if name.endswith(".json"):  # as it stands, and without its escapes
        try:
            searched = "\n".join(_strings(json.loads(text, object_pairs_hook=list)))
            text += json.dumps(json.loads(text), ensure_ascii=False)
        except ValueError as error:
            raise ValueError(f"{name} is not valid JSON ({error}): write it again.") from error
    at_a_word = SECRETS_AT_A_WORD.search(text)
    for kind, pattern in SECRETS.items():
        if (at_a_word or not pattern.startswith(WORD)) and re.search(pattern, text):
            raise ValueError(f"{name} contains {kind}. Remove it, and revoke it if it was ever shared.")
    if token is not None and token in text:
        raise ValueError(f"{name} contains your access token. Remove it, and revoke it if it was ever shared.")
    found = LOCAL_PATH.search(searched)
    for path in {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve().parent}:
        if len(path.parts) > 2:
            found = found or re.search(rf"(?<![\w.]){re.escape(str(path))}(?![\w-])[^\s\"',]*", text)
    if found:
        raise ValueError(f"{name} contains the local path {found[0]}. Remove it, or use a Hub id instead.")


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in JSON whose objects are lists of pairs, so that a repeated key hides no value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)


def package_code(layout: str) -> dict[str, str]:
    """Read the modules that `save_pretrained` writes next to a checkpoint: name -> text."""
    with tempfile.TemporaryDirectory() as folder:
        for one in SHIPPED_CLASSES.get(layout, ()):
            custom_object_save(one, folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.py"))}


def _read_text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason}): write it again.") from error


def _refuse_outside(folder: Path, name: str) -> None:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{name} is a link to a file outside of {folder}: copy the folder with `cp -rL`, and push the copy."
        )


__all__ = ["WEIGHTS_FILE", "find_binaries", "package_code", "read_text_in", "read_texts", "refuse_secrets"]
