"""The page on serving: its blocks run against a real server, and its tables name what the server has."""

import re

import httpx
import numpy as np
import pytest
from http_bodies import as_file
from pages import ROOT, walk
from prometheus_client.parser import text_string_to_metric_families

from openvla_hf.serving import errors
from openvla_hf.serving.policy import ServedPolicy


PAGE = ROOT / "docs/serving.md"


@pytest.fixture(scope="module")
def url(serve, plain_policy):
    policy = ServedPolicy(plain_policy.model, plain_policy.processor, unnorm_key="tiny")
    with serve(policy) as url:
        yield url


def test_the_blocks_of_the_page_run_one_after_the_other(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frame.png").write_bytes(as_file(np.zeros((48, 64, 3), np.uint8)))
    names = walk(PAGE, lambda arguments: None, {"http://127.0.0.1:8000": url, "timeout=10": "timeout=30"}).names
    assert np.shape(names["answer"]["actions"]) == np.shape(names["details"]["probabilities"]) == (1, 7)
    names["server"].close()


def test_the_page_lists_every_error_and_every_metric(url):
    page = PAGE.read_text(encoding="utf-8")
    told = {kind: int(status) for kinds, status in re.findall(r"^\| (`.*`) \| (\d{3}) \|", page, re.MULTILINE)
            for kind in re.findall(r"`(\w+)`", kinds)}  # fmt: skip
    kinds = errors.ServingError.__subclasses__()
    assert told == {kind("").kind: kind.status for kind in kinds}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        assert f"`{family.name.removesuffix('_created')}" in page, family.name
