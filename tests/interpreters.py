"""Python processes that start within a second, because each is forked from one that has imported PyTorch.

    with Interpreters(tmp_path) as interpreters:
        process = interpreters.start("-c", "import torch; print(torch.ones(2).sum())", env=dict(os.environ))
        assert process.wait() == 0
        print(process.output())

Nothing from Hugging Face or from this package is imported before the fork, so these libraries read the environment
variables of the new process. Python and PyTorch have already read theirs; only `PYTHONIOENCODING` is applied again.
transformers gets the list of its models, which takes most of the time to import it.
Functions are compiled in a process only if `env` has another value for `TORCHDYNAMO_DISABLE`.
"""

import gc
import importlib
import importlib.machinery
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


# Modules of other packages that take most of the time to import transformers and datasets.
PRELOADED = (
    *("numpy", "pandas", "PIL.Image", "pyarrow.compute", "sympy", "torch"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("fsspec.asyn", "jinja2.ext", "jinja2.sandbox", "psutil", "regex", "rich.progress", "rich.table", "yaml"),
)
# Objects between two passes of the garbage collector. Imports alone would cause hundreds of passes.
COLLECTED = 50_000
# bitsandbytes compiles its CPU kernels for each size of a layer, and reads this variable when it is imported.
NO_COMPILATION = {"TORCHDYNAMO_DISABLE": "1"}
MODELS = "models.pickle"
FRESH = {"huggingface_hub", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "openvla_hf"}

# First lines of code that must work where this package is not installed.
WITHOUT_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvla_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
"""


@dataclass
class Process:
    """A started process; `output()` and `errors()` return the text that it has written so far."""

    pid: int
    server: "Interpreters"
    folder: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        return self._ask(block=False)

    def wait(self) -> int:
        status = self._ask(block=True)
        assert status is not None
        return status

    def output(self) -> str:
        return (self.folder / "stdout").read_text()

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def _ask(self, block: bool) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask({"wait": self.pid, "block": block})
        return self.returncode


class Interpreters:
    """Start processes that write to files in `folder`. Each process also gets the errors of the shared imports."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = 0
        self._imported = folder / "imported"

    def __enter__(self) -> Self:
        list_models(self.folder / MODELS)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.folder / MODELS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._imported.open("w"),
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: str, env: dict[str, str]) -> Process:
        """Start the same as `python *arguments` (`-c code`, `-m module` or a script) in a new session."""
        self.started += 1
        folder = self.folder / str(self.started)
        folder.mkdir()
        job = {"start": arguments, "env": NO_COMPILATION | env, "cwd": os.getcwd(), "folder": str(folder)}
        return Process(self.ask(job | {"imported": str(self._imported)}), self, folder)

    def run(self, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, env=env)
        status = process.wait()
        return subprocess.CompletedProcess(arguments, status, process.output(), process.errors())


def list_models(path: Path) -> None:
    """Write the list that transformers makes of its models when it is imported, from the 2,000 files of their code."""
    import transformers
    from transformers.utils.import_utils import create_import_structure_from_path

    folder = Path(transformers.__file__).parent / "models"
    path.write_bytes(pickle.dumps((folder, create_import_structure_from_path(folder))))


class ListedModels:
    """Finder that gives transformers the list of its models, instead of letting it read their code twice."""

    def __init__(self, path: str):
        self.folder, self.listed = pickle.loads(Path(path).read_bytes())

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        execute = spec.loader.exec_module

        def execute_and_list(module: Any) -> None:
            execute(module)
            read = module.create_import_structure_from_path
            known = (self.folder, str(self.folder / "__init__.py"))
            module.create_import_structure_from_path = lambda path: self.listed if path in known else read(path)

        spec.loader.exec_module = execute_and_list
        return spec


def serve() -> list[str]:
    """Answer requests until there are no more. In a new process, return its arguments."""
    for request in map(json.loads, iter(sys.stdin.readline, "")):
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            print(json.dumps(answer), flush=True)
            continue
        (Path(request["folder"]) / "stdout").touch()
        shutil.copy(request["imported"], Path(request["folder"]) / "stderr")
        if not (answer := os.fork()):
            become(request)
            return request["start"]
        print(json.dumps(answer), flush=True)
    return []


def become(job: dict[str, Any]) -> None:
    """Take the environment, the folder and the files of a new process."""
    os.setsid()
    # A shell ignores Ctrl-C in jobs that it starts in the background, and their processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for descriptor, path in enumerate((os.devnull, f"{job['folder']}/stdout", f"{job['folder']}/stderr")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    if encoding := os.environ.get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding)


def run(kind: str, *arguments: str) -> None:
    """Run code, a module or a script as the main module."""
    match kind:
        case "-c":
            sys.argv = ["-c", *arguments[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(arguments[0], "<string>", "exec"), vars(main))
        case "-m":
            sys.argv = list(arguments)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        case script:
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ""  # the current folder of a process, instead of the folder of this file
    for name in PRELOADED:
        importlib.import_module(name)
    assert not FRESH & set(sys.modules)
    sys.meta_path.insert(0, ListedModels(sys.argv[1]))
    gc.freeze()
    gc.set_threshold(COLLECTED)
    if arguments := serve():
        run(*arguments)
