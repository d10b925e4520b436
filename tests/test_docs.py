"""The README and the docs keep their promises: the code runs, the commands exist and the links work."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from pages import PAGES, ROOT, check_command, fill_in, read_blocks, read_commands, run_command, small_hub, walk
from PIL import Image

from openvla_hf.cli import build_parser
from openvla_hf.cli.config_file import insert_config


README = ROOT / "README.md"
# These pages have their own tests, which check the results of the blocks.
ELSEWHERE = {"walkthrough.md", "data.md", "relatives.md", "robot.md", "serving.md"}
OTHERS = [page for page in PAGES if page != README and page.name not in ELSEWHERE and read_blocks(page)]
# A tiny model on a CPU: two steps instead of thousands.
SMALLER = {"finetune": "--steps 2 --workers 0 --set dtype=float32 batch_size=2 lora_rank=2 use_cpu=true --json"}
# Beginnings of the commands that run; the options of the others are checked.
RUNS = {
    "README.md": ("predict", "doctor", "finetune", "merge", "quantize outputs", "push", "info"),
    "quickstart.md": ("predict", "info"),
    "finetuning.md": (
        "finetune --model openvla/openvla-7b --data lab/kitchen --recipe lora",
        "evaluate --model outputs/kitchen",
        "merge",
    ),
    "hub.md": ("push", "info"),
    "open-x.md": ("doctor oxe", "finetune --model openvla/openvla-7b --mixture", "finetune --config"),
    "robots.md": ("predict", "info"),
    "oft.md": ("predict",),
}
# Beginnings of the commands that run as they are, since they are small.
AS_WRITTEN = {"open-x.md": ("record", "finetune --config tabletop_run.toml")}
SMALLER_PYTHON = {
    '"max_steps": 2000': '"max_steps": 2, "batch_size": 2, "use_cpu": True, "logging_steps": 1',
    'random_model("7b"': 'random_model("tiny"',
}
# Pages that continue where the page on fine-tuning ends.
FINETUNED = {"hub.md"}
TRAIN = {"finetuning.md", "hub.md"}

__all__ = ["small_hub"]


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def make_smaller(arguments):
    return [*arguments, *SMALLER.get(arguments[0], "").split()]


def runs_on(page):
    """Return a function that gives the arguments with which a page's command runs here."""

    def arguments_here(arguments):
        command = " ".join(arguments)
        if command.startswith(AS_WRITTEN.get(page.name, ())):
            return arguments
        return make_smaller(arguments) if command.startswith(RUNS.get(page.name, ())) else None

    return arguments_here


@pytest.mark.slow
def test_the_blocks_of_the_readme_run_one_after_the_other(small_hub):
    walked = walk(README, runs_on(README))
    names = walked.names
    assert (names["action"].shape, names["action"].dtype) == ((7,), "float64")
    assert names["details"].probabilities.shape == (2, 7, 256)
    assert Image.open("frame.png").size == (224, 224)
    assert len(walked.printed) == len(RUNS["README.md"])
    pushed = small_hub.files("someone/openvla-7b-kitchen")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "openvla/openvla-7b"
    assert "datasets:\n- lab/kitchen" in pushed["README.md"].decode()


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page_id(page), marks=[pytest.mark.slow] * (page.name in TRAIN)) for page in OTHERS]
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, small_hub):
    if page.name in FINETUNED:
        run_command(*make_smaller(fill_in(["finetune", "..."])))
        run_command("merge", "outputs/kitchen", "outputs/kitchen-merged")
    # The page's published adapter is the adapter that the page trains.
    (small_hub.root / "someone").mkdir(exist_ok=True)
    (small_hub.root / "someone/openvla-7b-adapter").symlink_to(Path("outputs/kitchen").absolute())
    walk(page, runs_on(page), SMALLER_PYTHON, image=Image.open("frame.png"))


def test_the_scripts_for_clusters_start_64_processes_with_options_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {block.title: block.code for block in read_blocks(ROOT / "docs/open-x.md")}
    machines = {"SLURM_NNODES": "8", "SLURM_JOB_NODELIST": "first,second"}
    machines |= {"SKYPILOT_NUM_NODES": "8", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "first\nsecond"}
    task = yaml.safe_load(files["openx.yaml"])
    assert "#SBATCH --nodes=8\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n" in files["openx.slurm"]
    assert (task["num_nodes"], task["resources"]["accelerators"].rpartition(":")[2]) == (8, "8")
    for script in (files["openx.slurm"], task["run"]):
        ((program, *arguments),) = read_commands(script, machines)
        check_command(program, *arguments)
        launched = launch_command_parser().parse_args(arguments[1:])
        finetuned = build_parser().parse_args(insert_config(launched.training_script_args))
        assert (launched.num_machines, launched.num_processes, launched.main_process_ip) == (8, 64, "first")
        assert finetuned.world_size == 64


def test_links_of_the_readme_lead_to_files_of_the_repository():
    links = [
        link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8")) if "://" not in link
    ]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_files_that_the_readme_names_exist():
    text = README.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"sim", "data", "quantize"} <= project["optional-dependencies"].keys()
    text = text[text.index("src/openvla_hf/\n") :].partition("```")[0]
    tree = re.findall(r"^  ([\w/.]+(?:, [\w/.]+)*)\s{2,}", text, re.MULTILINE)
    files = [name for names in tree for name in names.split(", ")]
    assert len(files) > 10
    for name in files:
        assert (ROOT / "src/openvla_hf" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_cell_of_a_table_contains_a_command(page):
    for line in page.read_text(encoding="utf-8").splitlines():
        assert not re.match(r"\|.*`(openvla-hf|python|accelerate|pip|make|taskset) ", line), line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_lines_of_prose_wrap_at_120_columns(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        # Table rows and links can't be wrapped.
        assert len(line) <= 120 or line.startswith("|") or "](http" in line, f"{page_id(page)}:{number}"


@pytest.mark.parametrize("module", ["openvla_hf", "openvla_hf.data", "openvla_hf.serving", "openvla_hf.testing"])
def test_the_reference_describes_every_public_name(module):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    described = {line.rpartition(".")[2] for line in pages.splitlines() if line.startswith("::: ")}
    if f"::: {module}\n" in pages:
        return
    # The first is an alias of a class in transformers, the second is a table.
    missing = {*importlib.import_module(module).__all__} - described - {"AutoModelForVision2Seq", "MIXTURES"}
    assert not missing


def test_the_errors_that_the_docs_explain_are_those_of_the_code():
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code).replace("`", "").replace("{CONFIG_NAME}", "config.json")
    explained = re.findall(r"^### `(.+)`$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(explained) > 10
    for error in explained:
        for part in error.split("..."):
            assert part.strip(" :,") in code, error
