"""The script that repeats the paper's claims measures nothing twice, and pairs its policies correctly."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from openvla_hf.suites.results import wilson
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY


pytest.importorskip("gymnasium")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "claims.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not installed")


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("claims", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["claims"]


def without_cost(rows):
    return [{name: value for name, value in row.items() if name != "cpu_seconds"} for row in rows]


def test_a_claim_that_is_run_again_plays_only_what_is_missing(claims, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "CONDITIONS", ("as told", "swapped"))  # a black image takes 80 steps
    command = ["distractor", "--episodes", "2", "--output", str(tmp_path), "--json"]
    claims.main(command)
    first = json.loads(capsys.readouterr().out)["distractor"]
    assert [row["name"] for row in first] == ["as told", "swapped"]
    assert {row["episodes"] for row in first} == {2}
    told = first[0]
    assert (told["low"], told["high"]) == wilson(told["solved"], 2)
    assert told["figures"]["named object moved"] + told["figures"]["another object moved"] <= 1
    assert "solved as told too" in first[1]["figures"]

    # A run that was killed in its last evaluation.
    cut, whole = sorted((tmp_path / "evaluations").glob("*/episodes.jsonl"))
    before = whole.read_bytes()
    header, *episodes = cut.read_text(encoding="utf-8").splitlines(keepends=True)
    cut.write_text(header + episodes[0] + episodes[1][:20], encoding="utf-8")
    (tmp_path / "claims.json").write_text('{"lora": []}', encoding="utf-8")
    claims.main(command)
    assert without_cost(json.loads(capsys.readouterr().out)["distractor"]) == without_cost(first)
    assert whole.read_bytes() == before
    kept = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    assert kept.keys() == {"lora", "distractor"}
    with pytest.raises(ValueError, match="another run, which differs in protocol"):
        claims.main(["distractor", "--episodes", "3", "--output", str(tmp_path)])


def test_a_training_that_was_killed_continues_and_a_finished_one_is_kept(claims, tmp_path):
    settings = {"lora_rank": 1, "lora_alpha": 1, "learning_rate": 1e-3, "batch_size": 2}
    bench = claims.Workbench(tmp_path, episodes=1, steps=None, held_out=1)
    policy = bench.finetune(TABLETOP_POLICY, "lora", 2, 1, **settings)
    assert 0 < policy.training["trained"] < 50_000
    assert 0 <= policy.training["held-out tokens"] <= 1
    record = policy.source.with_name(f"{policy.name}.json")
    result = policy.source / "adapter_model.safetensors"
    trained = result.read_bytes()
    assert bench.finetune(TABLETOP_POLICY, "lora", 2, 1, **settings).training == policy.training

    record.unlink()  # killed after the last step
    result.unlink()
    again = bench.finetune(TABLETOP_POLICY, "lora", 2, 1, **settings)
    assert result.read_bytes() == trained
    assert again.training["held-out tokens"] == policy.training["held-out tokens"]
    assert again.training["cpu_seconds"] > policy.training["cpu_seconds"]


def test_a_pair_counts_the_episodes_that_one_policy_alone_solved(claims, tmp_path):
    folders = {}
    for name, solved in {"first": [1, 1, 1, 0], "other": [1, 0, 0, 1]}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        lines = [{"model": name}] + [
            {"environment": "tabletop", "seed": seed, "task": "lift", "instruction": "", "success": bool(one)}
            for seed, one in enumerate(solved)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folders[name] / "episodes.jsonl").write_text(text, encoding="utf-8")
    row = claims.pair(claims.Row("other", 4, 2, 0.0, {}), folders["first"], folders["other"])
    low, high = row.figures.pop("difference, low"), row.figures.pop("difference, high")
    assert low < row.figures["difference"] < high
    assert row.figures == {"lost": 2, "won": 1, "p (McNemar)": "1", "difference": -0.25}


def test_the_plot_of_the_demonstrations_is_a_small_drawing(claims, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        claims.Row(f"{start}, {size}", 200, solved, 0.0, {"demonstrations": size})
        for start, solved in (("fine-tuned", 150), ("from scratch", 0))
        for size in claims.SIZES
    ]
    claims.plot_data(rows, tmp_path / "data.svg")
    drawing = (tmp_path / "data.svg").read_text(encoding="utf-8")
    assert len(drawing) < 20_000
    assert "from scratch" in drawing
    assert asdict(rows[0])["success"] == 0.75
