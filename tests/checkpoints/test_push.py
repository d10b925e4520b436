"""Policies on the Hub: the real client against a stand-in (`hub_server.py`), in this process and in fresh ones."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from openvla_hf.checkpoints.describe import describe
from openvla_hf.checkpoints.push import push
from openvla_hf.checkpoints.shared_files import TEXT_FILES, read_text_in, refuse_secrets
from openvla_hf.cli import main
from openvla_hf.data import from_episodes
from openvla_hf.evaluation.suites import find_suite
from openvla_hf.processing.processing_openvla import VICUNA_PROMPT
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY
from openvla_hf.testing import fake_episode
from openvla_hf.training.finetune import FinetuneArguments, build_trainer, train


INSTRUCTION = "pick up the red block"

# Runs the code of repositories' own model cards, and then earlier revisions.
READER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvla_hf":
            raise ModuleNotFoundError(name)

image_file, usage, earlier, package = sys.argv[1:]
if package == "absent":
    sys.meta_path.insert(0, Refuse())
else:
    import openvla_hf

from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

image = Image.open(image_file)
actions = []
for code in json.loads(usage):
    scope = {"image": image}
    exec(code, scope)
    actions.append(scope["action"].tolist())
for repo, revision in json.loads(earlier):
    kwargs = {"revision": revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(repo, **kwargs)
    processor = AutoProcessor.from_pretrained(repo, **kwargs)
    actions.append(model.predict_action(**processor(image, instruction="pick up the red block")).tolist())
print(json.dumps(actions))
"""


def save(folder, pair, **kwargs):
    for one in pair:
        one.save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture
def saved(tiny, tmp_path):
    """The folder of a tiny policy."""
    return save(tmp_path / "saved", tiny())


def add_text(path, text):
    """Put a text into a file of a checkpoint, or of its run."""
    if path.suffix == ".jinja":
        path.write_text(text)
        return
    content = json.loads(path.read_text()) if path.is_file() else {"settings": {}}
    (content["settings"] if path.name == "training.json" else content)["note"] = text
    path.write_text(json.dumps(content, indent=2))


def card_of(hub, repo, revision="main"):
    return ModelCard(hub.files(repo, revision)["README.md"].decode())


def usage(hub, repo):
    return re.search(r"```python\n(.*?)```", card_of(hub, repo).text, re.DOTALL)[1]


def test_a_pushed_policy_acts_where_the_package_is_not_installed(tiny, owner, run_python, tmp_path):
    image = fake_episode(steps=1)[0]["image"]
    Image.fromarray(image).save(tmp_path / "image.png")

    def act(model, processor):
        return model.predict_action(**processor(image, instruction=INSTRUCTION)).tolist()

    first, second, single = tiny(), tiny(seed=1), tiny(seed=2, fused=False)
    expected = [act(*pair) for pair in (second, single, first)]
    assert expected[0] != expected[2]
    old = push(first[0], "someone/policy", processor=first[1], private=True).oid
    push(second[0], "someone/policy", processor=second[1])
    # As transformers pushes: two commits and its own card.
    single[0].push_to_hub("someone/single")
    single[1].push_to_hub("someone/single")
    codes = [usage(owner, "someone/policy"), usage(owner, "someone/policy").replace("/policy", "/single")]
    cases = (tmp_path / "image.png", json.dumps(codes), json.dumps([("someone/policy", old)]))
    result = run_python(READER, *cases, "absent", **owner.env)
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    # Once cached, the policy loads without the Hub, and acts the same with the package installed.
    asked = len(owner.requests)
    result = run_python(READER, *cases, "installed", **owner.env | {"HF_HUB_OFFLINE": "1"})
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    assert len(owner.requests) == asked


def test_a_quantised_policy_is_pushed_and_acts_where_the_package_is_not_installed(tiny, owner, run_python, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = str(save(tmp_path / "whole", tiny(text_width=128)))
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save(tmp_path / "image.png")
    expected, codes = [], []
    for bits in ("4", "8"):
        folder = str(tmp_path / bits)
        assert main(["quantize", whole, folder, "--bits", bits, "--json"]) == 0
        push(folder, f"someone/small-{bits}")
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        inputs = processor(Image.open(tmp_path / "image.png"), instruction=INSTRUCTION)
        expected.append(model.predict_action(**inputs).tolist())
        codes.append(usage(owner, f"someone/small-{bits}"))
    result = run_python(READER, tmp_path / "image.png", json.dumps(codes), "[]", "absent", **owner.env)
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_a_private_repository_needs_a_token(tiny, owner, monkeypatch):
    model, processor = tiny()
    push(model, "someone/secret", processor=processor, private=True)
    assert describe("someone/secret").layout == "openvla-hf"
    assert AutoModel.from_pretrained("someone/secret").norm_stats == model.norm_stats
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(constants.HF_HUB_CACHE)
    for read in (describe, AutoModel.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(OSError, match="someone/secret is not a local folder"):
            read("someone/secret")
    assert describe("someone/secret", token=owner.token).layout == "openvla-hf"
    assert AutoModel.from_pretrained("someone/secret", token=owner.token).norm_stats == model.norm_stats


def test_a_failed_push_says_why_in_one_sentence(tiny, owner, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's retries
    folder = save(tmp_path / "run", tiny())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"Pushing needs a token .* Run `hf auth login`"):
        push(folder, "someone/policy")
    assert owner.requests == []
    with pytest.raises(OSError, match=r"refused someone/policy \(401\): the token is not valid"):
        push(folder, "someone/policy", token="hf_revoked")
    push(folder, "someone/policy", token=owner.token)
    before = owner.commit("someone/policy")
    with pytest.raises(OSError, match=r"refused someone/policy \(403\): the token has no write access"):
        push(folder, "someone/policy", token=owner.guest_token)
    with pytest.raises(OSError, match=r"refused someone/policy \(404\)"):
        push(folder, "someone/policy", token=owner.token, create_pr=True, revision="absent")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()  # the client asks once for each of its sessions
        with pytest.raises(OSError, match=r"Cannot push .* while HF_HUB_OFFLINE is set"):
            push(folder, "someone/policy", token=owner.token)
    close_session()
    assert owner.commit("someone/policy") == before
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match=r"Cannot reach http://127\.0\.0\.1:9 .* push again"):
        push(folder, "someone/policy", token=owner.token)


def test_one_commit_contains_everything_and_no_trace_of_its_author(tiny, owner, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "adalovelace"))
    folder = save(tmp_path / "adalovelace" / "run", tiny(), max_shard_size="60KB")
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(tmp_path)}))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    push(folder, "someone/policy", commit_message="First")
    repository = owner.repository("someone/policy")
    assert [repository.messages[oid] for oid in repository.commits] == ["", "First"]
    pushed = owner.files("someone/policy")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(pushed) == {
        *shards,
        *("model.safetensors.index.json", "config.json", "generation_config.json", "dataset_statistics.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "requirements.txt"),
        *(path.name for path in folder.glob("*.py")),
    }
    assert pushed["requirements.txt"].decode().splitlines()[0] == "transformers>=5.20"
    assert b"==" not in pushed["requirements.txt"]
    for secret in (owner.token, "adalovelace", str(Path.cwd()), tempfile.gettempdir()):
        assert not [name for name, content in pushed.items() if secret.encode() in content]
    # Other shards replace the first ones, and unchanged files are not sent again.
    asked = len(owner.requests)
    save(tmp_path / "whole", tiny())
    push(tmp_path / "whole", "someone/policy")
    weights = [name for name in owner.files("someone/policy") if "safetensors" in name]
    assert weights == ["model.safetensors"]
    assert sum(request.startswith("PUT") for request in owner.requests[asked:]) == 1


def test_an_upload_that_breaks_off_shows_nothing_and_is_resumed(tiny, owner, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's retries
    folder = save(tmp_path / "run", tiny(), max_shard_size="60KB")
    shards = len(list(folder.glob("*.safetensors")))
    owner.uploads_until_cut = 2
    with pytest.raises(OSError, match=r"failed .* Push again"):
        push(folder, "someone/policy")
    assert owner.files("someone/policy") == {}
    arrived = len(owner.blobs)
    assert arrived == 2
    owner.uploads_until_cut = None
    asked = len(owner.requests)
    push(folder, "someone/policy")
    assert sum(request.startswith("PUT") for request in owner.requests[asked:]) == shards - arrived
    for path in folder.glob("*.safetensors"):
        assert owner.files("someone/policy")[path.name] == path.read_bytes()


def test_branches_and_pull_requests_leave_main_alone(tiny, owner):
    model, processor = tiny()
    push(model, "someone/policy", processor=processor)
    main_commit = owner.commit("someone/policy")
    other, _ = tiny(seed=1)
    push(other, "someone/policy", processor=processor, revision="tuned", license="mit")
    opened = push(other, "someone/policy", processor=processor, create_pr=True)
    assert opened.pr_url.endswith("/discussions/1")
    assert owner.commit("someone/policy") == main_commit
    weights = [owner.files("someone/policy", name)["model.safetensors"] for name in ("main", "tuned", "refs/pr/1")]
    assert weights[1] == weights[2] != weights[0]
    assert card_of(owner, "someone/policy", "tuned").data.license == "mit"


def test_the_card_describes_the_run(tiny, owner, tmp_path):
    base = owner.root / "someone/base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder = save(
        tmp_path / "run", tiny(norm_stats={key: fake_statistics(dim) for key, dim in (("arm", 7), ("two", 14))})
    )
    row = {"episodes": 40, "success": 0.825, "moved_target": 1.0, "steps": 20.0}
    for name, content in {
        "training.json": {
            "base_model": "someone/base",
            "datasets": ["someone/kitchen"],
            "recipe": "lora",
            "settings": {"learning rate": 5e-4},
            "figures": {"action_accuracy": 0.93, "eval_loss": 0.123456, "train_runtime": 12.0},
        },
        "evaluation.json": {"results": {"as told": {"all": row}, "black": {"all": row | {"success": 0.0}}}},
        "quantization.json": [{"format": "4bit", "agreement": 0.97}],
    }.items():
        (folder / name).write_text(json.dumps(content))
    push(folder, "someone/policy")
    card = card_of(owner, "someone/policy")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "robotics", "apache-2.0")
    assert (data.base_model, data["base_model_relation"], data.datasets) == (
        "someone/base",
        "finetune",
        ["someone/kitchen"],
    )
    assert [(one.dataset_config, one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("as told", "success_rate", 0.825),
        ("black", "success_rate", 0.0),
    ]
    assert 'unnorm_key="arm"' in usage(owner, "someone/policy")
    for line in (
        "| recipe | lora |",
        "| learning rate | 0.0005 |",
        "| action accuracy | 0.93 |",
        "| eval loss | 0.1235 |",
        "| as told | all | 40 | 82.5% |",
        "| format | agreement |",
        "| 4bit | 0.97 |",
        "apache-2.0, like its base model [someone/base]",
    ):
        assert line in card.text
    assert re.search(r"\| `two` \| 14 \| -0.03, .* \| 6, 13 \| not recorded \| 90 \|", card.text)
    for absent in ("More Information Needed", "runtime"):
        assert absent not in card.text
    assert not set(owner.files("someone/policy")) & {"training.json", "evaluation.json", "quantization.json"}


def test_the_card_shows_the_protocol_and_the_intervals_of_a_suite(tiny, owner, tmp_path):
    folder = save(tmp_path / "run", tiny())
    suite = find_suite("libero_goal")
    row = {"episodes": 500, "success": 0.97, "low": 0.9511, "high": 0.9817, "steps": 120.0}
    result = {**suite.describe(), "environment": suite.name, "versions": {"mujoco": "3.3.0", "numpy": "2.4.6"}}
    (folder / "evaluation.json").write_text(json.dumps({**result, "results": {"as told": {"all": row}}}))
    push(folder, "someone/policy")
    card = card_of(owner, "someone/policy")
    assert [(one.dataset_type, one.metric_value) for one in card.data.eval_results] == [("libero_goal", 0.97)]
    for line in (
        "| condition | task | episodes | success | 95% interval |",
        "|---|---|---|---|---|",
        "| as told | all | 500 | 97.0% | 95.1% to 98.2% |",
        "Measured by `openvla-hf evaluate --suite libero_goal` under this protocol:",
        "| max steps | 300 |",
        "| cameras | full_image, wrist_image |",
        "| crop area | 0.9 |",
        "| versions | mujoco 3.3.0, numpy 2.4.6 |",
    ):
        assert f"\n{line}\n" in card.text


def fake_statistics(dim):
    one = {"q01": [-0.03] * dim, "q99": [0.03] * dim, "mask": [index % 7 != 6 for index in range(dim)]}
    return {"action": one, "num_transitions": 90}


def test_an_adapter_names_a_base_that_others_can_load(tiny, owner, tmp_path):
    base = save(tmp_path / "base", tiny())
    model, processor = tiny()
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    folder = save(tmp_path / "adapter", (adapted, processor))
    with pytest.raises(ValueError, match=r"base .* is not a Hub id\. Pass its Hub id as `base_model`"):
        push(folder, "someone/adapter")
    assert not (owner.root / "someone/adapter").exists()
    push(base, "someone/base", license="mit")
    push(folder, "someone/adapter", base_model="someone/base")
    pushed = owner.files("someone/adapter")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    data = card_of(owner, "someone/adapter").data
    assert (data.library_name, data["base_model_relation"], data.license) == ("peft", "adapter", "mit")
    assert b"peft" in pushed["requirements.txt"]
    found = describe("someone/adapter")
    assert (found.layout, found.base_model) == ("adapter", "someone/base")


def tune(base, output, name):
    """Train two steps with a named recipe, on a dataset that no other test uses."""
    frames = from_episodes([fake_episode(seed=seed, steps=6) for seed in range(2)], name="kitchen")
    settings = {"dtype": "float32", "batch_size": 4, "learning_rate": 0.01, "dataloader_num_workers": 0}
    settings |= {"lora_rank": 4} if "lora" in name else {}
    settings |= {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    arguments = FinetuneArguments(model=base, data=frames, output=output, recipe=name, settings=settings)
    trainer = build_trainer(arguments)
    trainer.record["datasets"] = ["someone/kitchen", str(output.parent / "kitchen")]
    train(trainer)
    return output


def test_a_pushed_adapter_needs_three_lines_and_no_other_file(tiny, owner, run_python, tmp_path):
    model, processor = tiny()
    processor.prompt_template = VICUNA_PROMPT
    push(model, "someone/base", processor=processor, license="mit")
    folder = tune("someone/base", tmp_path / "run", "lora")
    image = fake_episode(steps=1)[0]["image"]
    Image.fromarray(image).save(tmp_path / "image.png")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(image, instruction=INSTRUCTION)
    # What a user would get wrong without the repository's own statistics, prompt, crop or weights.
    assert list(model.norm_stats) == ["kitchen"]
    assert processor.prompt_template == VICUNA_PROMPT
    assert processor.image_processor.center_crop_area == 0.9
    base = AutoModel.from_pretrained("someone/base")
    assert not torch.equal(model(**inputs).logits, base(**inputs).logits)

    push(folder, "someone/adapter")
    shutil.rmtree(folder)
    card = card_of(owner, "someone/adapter")
    assert (card.data.base_model, card.data["base_model_relation"], card.data.license) == (
        "someone/base",
        "adapter",
        "mit",
    )
    assert card.data.datasets == ["someone/kitchen"]
    code = usage(owner, "someone/adapter")
    assert len([line for line in code.splitlines() if "import" not in line and line]) == 3
    cases = (tmp_path / "image.png", json.dumps([code]), "[]")
    result = run_python(READER, *cases, "installed", **owner.env)
    assert json.loads(result.stdout.splitlines()[-1]) == [model.predict_action(**inputs).tolist()]


USER = """
import json, sys
import numpy as np
import openvla_hf
from transformers import AutoModel, AutoProcessor

def use(repo, prompt, image, trust):
    model = AutoModel.from_pretrained(repo, dtype="auto", **trust)
    processor = AutoProcessor.from_pretrained(repo, **trust)
    inputs = processor(prompt, image)
    keys = sorted(model.norm_stats)
    actions = [model.predict_action(**inputs, unnorm_key=key, do_sample=False).tolist() for key in keys]
    details = model.predict_action(**processor(image, instruction="wave"), unnorm_key=keys[0], return_details=True)
    return [keys, str(model.dtype), type(model).__name__, type(processor).__name__,
            processor.prompt_template, inputs["input_ids"].tolist(), actions,
            details.token_ids.tolist(), details.probabilities.tolist()]

for prompt, image, *repositories in json.loads(sys.argv[1]):
    trusts = ({}, {"trust_remote_code": True})
    print(json.dumps([use(repo, prompt, image, trust) for repo in repositories for trust in trusts]))
"""
CASES = ("fused-224", "siglip-224", "sharded")


def test_a_published_repository_and_ours_differ_in_nothing_for_a_user(recorded, owner, run_python, tmp_path):
    jobs = []
    for case in CASES:
        record = recorded(case)
        published = Path(shutil.copytree(record.checkpoint, owner.root / "openvla" / case))
        # The miniature's towers, which a published config can't say.
        config = json.loads((published / "config.json").read_text()) | record.overrides
        (published / "config.json").chmod(0o644)
        (published / "config.json").write_text(json.dumps(config))
        push(save(tmp_path / case, (record.load(dtype="auto"), record.processor)), f"someone/{case}")
        record.images[0].save(tmp_path / f"{case}.png")
        image = str(tmp_path / f"{case}.png")
        jobs.append([record.cases["prompts"][0], image, f"openvla/{case}", f"someone/{case}"])
    told = run_python(USER, json.dumps(jobs), **owner.env).stdout.splitlines()[-len(jobs) :]
    for case, answers in zip(CASES, map(json.loads, told), strict=True):
        assert len(answers) == 4, case
        assert all(answer == answers[0] for answer in answers), case
        assert "OpenVLAForActionPrediction" in answers[0], case


@pytest.mark.parametrize("name", ["lora", "last-layer"])
def test_a_finished_run_has_a_card(tiny, owner, tmp_path, name):
    base = save(tmp_path / "base", tiny())
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder = tune(base, tmp_path / "run", name)
    card = ModelCard.load(folder / "README.md")
    assert f'from_pretrained("{folder}"' in card.text
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, ["someone/kitchen"], "apache-2.0")
    for line in (f"| recipe | {name} |", "| steps | 2 |", "| samples per step | 4 |", "| `kitchen` | 7 |"):
        assert line in card.text
    assert re.search(r"\| action l1 \| 0\.\d+ \|", card.text)
    push(folder, "someone/policy", base_model="someone/base" if name == "lora" else None, license="mit")
    pushed = card_of(owner, "someone/policy")
    assert 'from_pretrained("someone/policy"' in pushed.text
    assert str(tmp_path) not in str(pushed)


KEY = "0123456789abcdefghijABCDEFGHIJ012345"
SECRETS = {
    f"hf_{KEY}": "an access token of Hugging Face",
    f"ghp_{KEY}": "an access token of GitHub",
    f"github_pat_{KEY}": "an access token of GitHub",
    f"glpat-{KEY}": "an access token of GitLab",
    f"AKIA{KEY[:6]}ABCDEFGHIJ": "a key of AWS",
    f"sk-proj-{KEY}": "a key of OpenAI or Anthropic",
    f"AIza{KEY}": "a key of Google",
    f"xoxb-{KEY}": "an access token of Slack",
    f"WANDB_API_KEY={'0123456789' * 4}": "a key of Weights & Biases",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    f"npm_{KEY}": "an access token of npm",
    f"pypi-{KEY}": "an access token of PyPI",
    f"dckr_pat_{KEY}": "an access token of Docker",
    f"r8_{KEY}": "an access token of Replicate",
    f"sk_live_{KEY}": "a key of Stripe",
    f"eyJ{KEY}.eyJ{KEY}.{KEY}": "a JSON web token",
    f"Authorization: Bearer {KEY}": "a bearer token",
    "https://ada:lovelace@example.com/repo": "a URL with a password",
}
PATHS = [
    "/home/ada/runs/1", "/Users/ada/run", "/mnt/disk/run", "/root/run", "/tmp/run", "/media/ada/stick", "file:///home/ada",
    "/var/folders/xy/run", "C:\\Users\\Ada\\run", "d:/Users/ada", "c:\\users\\ada", "D:\\models\\ada",
    "\\\\server\\share", "/data/run", "/work/run", "/nfs/ada", "/opt/models", "/srv/models", "/lustre/ada",
    "/gpfs/ada", "/storage/ada", "/cluster/ada", "/content/drive/MyDrive", "/kaggle/working", "/dev/shm/run",
    "/run/user/1000", "~/run", "(/data/run)",
]  # fmt: skip


def test_tokens_and_keys_are_not_pushed(tmp_path):
    for secret, kind in SECRETS.items():
        for name in ("tokenizer_config.json", "README.md"):
            with pytest.raises(ValueError, match=rf"{re.escape(name)} contains {kind}\. Remove it, and revoke it"):
                refuse_secrets(name, json.dumps({"note": secret}), tmp_path, None)


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja", "training.json"])
def test_every_text_is_searched_for_secrets(saved, owner, file):
    add_text(saved / file, f"hf_{KEY}")
    told = "README.md" if file == "training.json" else file
    with pytest.raises(ValueError, match=f"{told} contains an access token"):
        push(saved, "someone/policy")
    assert owner.requests == []


def test_the_users_token_and_passwords_are_not_pushed(saved, owner, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual token")
    add_text(saved / "config.json", "an unusual token")
    with pytest.raises(ValueError, match=r"config\.json contains your access token"):
        push(saved, "someone/policy")
    config = json.loads((saved / "config.json").read_text()) | {"note": {"db_password": "correct horse"}}
    (saved / "config.json").write_text(json.dumps(config))
    push(saved, "someone/policy", token=owner.token)  # too short to be one
    config["note"] = {"db_password": "correct-horse-battery"}
    (saved / "config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(ValueError, match=r"config\.json contains a password or key"):
        push(saved, "someone/policy", token=owner.token)


def test_local_paths_of_any_system_are_not_pushed(tmp_path):
    for path in PATHS:
        escaped = json.dumps(path).replace("/", "\\u002f").replace("s", "\\u0073")
        once = f'{{"note": {json.dumps(path)}}}'
        twice = f'{{"note": {json.dumps(path)}, "note": ""}}'
        for text in (once, twice, f'{{"note": {escaped}}}', f"{{{escaped}: 0}}"):
            with pytest.raises(ValueError, match=r"special_tokens_map\.json contains the local path"):
                refuse_secrets("special_tokens_map.json", text, tmp_path, None)
        for text in (f"See {path}", once):
            with pytest.raises(ValueError, match=r"README\.md contains the local path"):
                refuse_secrets("README.md", text, tmp_path, None)


def test_texts_that_only_resemble_secrets_or_paths_are_pushed(tmp_path):
    texts = [
        "https://example.com/home/ada",
        "https://example.com:8080/data/work/~ada/opt",
        "task-sk-ills",
        "/tmp",
        "/root",
        "data/kitchen/1",
        "a/data/kitchen and ./data/kitchen",
        "Q:\\nA:",
        "Q:\npick\nA:\nopen",
        "https://user:{password}@example.com",
        "someone:else@example.com",
        "the bearer authentication-of-requests",
        "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+",
        "0123456789abcdef" * 2 + "01234567",
    ]
    for text in texts:
        refuse_secrets("config.json", json.dumps({"note": text}), tmp_path, None)


@pytest.mark.parametrize("place", ["tabletop", "recordings"])
def test_public_checkpoints_contain_no_secret_or_path(place, tmp_path):
    root = TABLETOP_POLICY if place == "tabletop" else Path(__file__).parents[1] / "parity" / "kept"
    texts = [
        path for path in root.rglob("*") if path.name in TEXT_FILES or path.name in ("README.md", "tokenizer.model")
    ]
    assert texts
    for path in texts:
        text = read_text_in(path) if path.suffix == ".model" else path.read_text()
        refuse_secrets(path.name, text, tmp_path, None)


def test_weights_of_a_variant_leave_the_repository_as_it_was(tiny, owner, tmp_path):
    push(save(tmp_path / "policy", tiny()), "someone/policy")
    before = owner.commit("someone/policy")
    folder = save(tmp_path / "half", tiny()[:1], variant="fp16")
    with pytest.raises(ValueError, match=r"has no weights .* model\.safetensors is missing\. Save the model again"):
        push(folder, "someone/policy")
    assert owner.commit("someone/policy") == before


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("w.bin", r"names the weights file 'w\.bin', but only safetensors files"),
        ("other.safetensors", r"names 'other\.safetensors', which is missing or has a name that is not pushed"),
        ("model-00002-of-00002.safetensors", r"names 'model-00002-of-00002\.safetensors', which is missing"),
        (None, r"has no weights file with a usual name: model\.safetensors is missing"),
    ],
)
def test_an_index_whose_weights_would_not_be_pushed_is_refused(saved, owner, named, problem):
    (saved / "model.safetensors").rename(saved / "other.safetensors")
    index = {"metadata": {}, "weight_map": {} if named is None else {"a.weight": named}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=problem):
        push(saved, "someone/policy")
    assert owner.requests == []


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("training.json", "[1]", "does not contain an object"),
        ("evaluation.json", "3", "does not contain an object"),
        ("quantization.json", "{}", "does not contain a list"),
        ("training.json", "{", "is not valid JSON"),
    ],
)
def test_a_damaged_file_of_the_run_is_refused_in_one_sentence(saved, owner, file, content, problem):
    (saved / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file} {problem}.*\. Write it again, or delete it\."):
        push(saved, "someone/policy")


def test_only_files_of_a_checkpoint_are_pushed(saved, owner):
    kept = {path.name for path in saved.iterdir()}
    strange = ["wandb.json", "notes.txt", ".env", "key.pem", "optimizer.safetensors", "model.bin", "config.json.orig"]
    for name in strange:
        (saved / name).write_bytes((saved / "model.safetensors").read_bytes() if "safetensors" in name else b"private")
    push(saved, "someone/policy")
    assert set(owner.files("someone/policy")) == kept | {"README.md", "requirements.txt"}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "model.safetensors", "training.json"])
def test_links_out_of_the_folder_are_refused(saved, owner, tmp_path, file):
    target = tmp_path / "elsewhere"
    target.write_bytes((saved / file).read_bytes() if (saved / file).exists() else b"{}")
    (saved / file).unlink(missing_ok=True)
    (saved / file).symlink_to(target)
    with pytest.raises(ValueError, match=f"{file} is a link to a file outside of .*: copy the folder with `cp -rL`"):
        push(saved, "someone/policy")
    assert owner.requests == []
    (saved / file).unlink()
    target.rename(saved / "inside")
    (saved / file).symlink_to("inside")
    push(saved, "someone/policy")


def test_metadata_in_the_header_of_weights_is_refused(saved, owner):
    path = saved / "model.safetensors"
    weights = load_file(path)
    quantised = {"tensor_names": '["a.weight"]', "a.weight": '{"_type": "Float8Tensor"}', "format": "pt"}
    for metadata in ({"format": "pt"}, None, quantised):
        save_file(weights, path, metadata)
        push(saved, "someone/policy")
    for key, value in (("author", "ada"), ("b.weight", "{}"), ("format", "pt of ada")):
        save_file(weights, path, quantised | {key: value})
        with pytest.raises(
            ValueError, match=rf"The header of model\.safetensors contains metadata '{key}', which is not"
        ):
            push(saved, "someone/policy")
    save_file(weights, path, quantised | {"a.weight": owner.token})
    with pytest.raises(ValueError, match=r"model\.safetensors contains an access token"):
        push(saved, "someone/policy")
    save_file(weights | {"/home/ada/weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors contains the local path /home/ada/weight"):
        push(saved, "someone/policy")


def test_a_folder_without_code_gets_that_of_the_package(tiny, saved, owner, run_python, tmp_path):
    for path in saved.glob("*.py"):
        path.unlink()
    push(saved, "someone/policy")
    assert b"openvla-hf" not in owner.files("someone/policy")["requirements.txt"]
    Image.fromarray(fake_episode(steps=1)[0]["image"]).save(tmp_path / "image.png")
    model, processor = tiny()
    expected = model.predict_action(**processor(Image.open(tmp_path / "image.png"), instruction=INSTRUCTION)).tolist()
    code = json.dumps([usage(owner, "someone/policy")])
    result = run_python(READER, tmp_path / "image.png", code, "[]", "absent", **owner.env)
    assert json.loads(result.stdout.splitlines()[-1]) == [expected]


def test_the_code_of_a_folder_is_not_pushed(saved, owner):
    original = (saved / "modeling_openvla.py").read_bytes()
    (saved / "modeling_openvla.py").write_text("import os")
    (saved / "train.py").write_text("# private")
    with (
        pytest.warns(UserWarning, match=r"^Not pushing train\.py: only modules of openvla-hf are pushed"),
        pytest.warns(
            UserWarning,
            match=r"^Pushing the code of the installed openvla-hf instead of the folder's modeling_openvla\.py",
        ),
    ):
        push(saved, "someone/policy")
    pushed = owner.files("someone/policy")
    assert pushed["modeling_openvla.py"] == original
    assert "train.py" not in pushed
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "train.Model"
    (saved / "config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(ValueError, match=r"config\.json needs the code in train\.py, but only modules of"):
        push(saved, "someone/policy")


@pytest.mark.parametrize(("content", "problem"), [(b"\xff\xfe{", "is not UTF-8 text"), (b"{", "is not valid JSON")])
def test_a_damaged_text_is_not_pushed(saved, owner, content, problem):
    (saved / "special_tokens_map.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"special_tokens_map\.json {problem} \(.*\): write it again"):
        push(saved, "someone/policy")


def test_a_source_that_cannot_be_pushed_is_refused_in_one_sentence(tiny, owner, tmp_path):
    model, _ = tiny()
    with pytest.raises(ValueError, match="without its processor"):
        push(model, "someone/policy")
    with pytest.raises(ValueError, match=r"is not a folder\. Give"):
        push(tmp_path / "absent", "someone/policy")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"not an OpenVLA checkpoint: its config\.json is for 'llava'"):
        push(tmp_path, "someone/policy")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has no safetensors files"):
        push(tmp_path, "someone/policy")


def test_a_checkpoint_is_described_alike_here_and_on_the_hub(tiny, owner, tmp_path):
    model, _ = pair = tiny()
    folder = save(tmp_path / "run", pair, max_shard_size="60KB")
    push(folder, "someone/policy")
    here, there = describe(folder), describe("someone/policy")
    for name in (
        "layout",
        "vision_towers",
        "language_model",
        "action_dims",
        "dtype",
        "parameters",
        "size",
        "has_code",
    ):
        assert getattr(here, name) == getattr(there, name), name
    assert (here.layout, here.dtype, here.has_code) == ("openvla-hf", "float32", True)
    assert here.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert here.action_dims == {"tiny": 7}


def test_layouts_are_distinguished(recordings, tmp_path):
    checkpoint = recordings("fused-224") / "checkpoint"
    published = describe(checkpoint)
    assert (published.layout, published.dtype, published.has_code) == ("published", "bfloat16", False)
    assert [tower.split(",")[0] for tower in published.vision_towers] == [
        "dinov2_with_registers",
        "siglip_vision_model",
    ]
    assert published.action_dims["aloha_bimanual"] == 14
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "action_head--100_checkpoint.pt").write_bytes(b"")
    assert describe(tmp_path).layout == "openvla-oft"


def test_the_commands(tiny, owner, tmp_path, capsys):
    folder = str(save(tmp_path / "run", tiny()))
    assert main(["push", folder, "someone/policy", "--license", "mit", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["commit"] == owner.commit("someone/policy")
    assert main(["info", "someone/policy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["action_dims"] == {"tiny": 7}
    assert main(["info", folder]) == 0
    assert "tiny: 7 dimensions" in capsys.readouterr().out
    assert main(["export", folder, str(tmp_path / "published")]) == 2
    assert "can't be exported" in capsys.readouterr().err
    assert main(["info", "someone/absent"]) == 2
    error = capsys.readouterr().err
    assert "someone/absent is not a local folder" in error
