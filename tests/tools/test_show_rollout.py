"""The sample viewer: what it takes from a dump, what it lets through, a page without network."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from spmd_rl.rollout import dump
from spmd_rl.types import Sample, Status
from tests.models import ROOT, tiny_model
from tests.tools.browser import APT, Browser, find


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two samples of one prompt in a file, and the model's directory."""
    model = tiny_model("qwen3")
    group = [
        Sample(0, 0, "2+2", [5, 6, 7, 8], "</script>4", 2, "4", 1.0, [1, 0], Status.COMPLETED,
               rollout_log_probs=[-0.1, -0.2], weight_versions=[1, 2]),
        Sample(0, 1, "2+2", [5, 6, 7], "5", 1, "4", 0.0, None, Status.TRUNCATED,
               rollout_log_probs=[-0.3], weight_versions=[2]),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("dump") / "0.json"
    dump.save(str(path), 0, group)
    return path, str(model)


def show(samples, *words):
    path, model = samples
    argv = [sys.executable, "tools/show_rollout.py", str(path), "--model", model, *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


def test_table_and_filters(samples):
    assert "2 of 2 samples" in show(samples).stdout
    told = show(samples, "--status", "truncated").stdout
    assert "1 of 2 samples" in told and "completed" not in told
    assert show(samples, "--min-reward", "2").returncode == 1


def test_the_page_holds_everything_and_asks_for_nothing(samples, tmp_path):
    page = tmp_path / "page.html"
    assert show(samples, "--html", str(page)).returncode == 0
    text = page.read_text()
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    first, second = json.loads(data)
    assert first["advantage"] == [0.5, 0] and first["loss_mask"] == [1, 0]
    assert second["advantage"] == [-0.5] and second["log_prob"] == [-0.3]
    assert first["version"] == [1, 2] and first["text"] == "</script>4"
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "default-src 'none'" in text


def test_advantages_and_gaps_are_the_trainers_where_it_left_them(samples, tmp_path):
    columns = {
        "unconcat_tokens": [torch.tensor([5, 6, 7, 8])],
        "rollout_ids": [0],
        "advantages": [torch.tensor([3.0, 3.0])],
        "log_probs": [torch.tensor([-0.5, -0.25])],
    }
    found = {"rollout_id": 0, "rank": 0, "rollout_data": columns}
    torch.save(found, tmp_path / "0_0.pt")
    page = tmp_path / "page.html"
    assert show(samples, "--html", str(page), "--train", str(tmp_path)).returncode == 0
    [data] = re.findall(r'<script id="data" type="application/json">(.*?)</script>',
                        page.read_text(), re.S)  # fmt: skip
    first, second = json.loads(data)
    assert first["advantage"] == [3, 0] and first["gap"] == pytest.approx([0.4, 0.05])
    assert second["advantage"] == [-0.5] and second["gap"] == [None]


def test_a_file_that_is_not_there_is_a_sentence(samples):
    done = show((samples[0].parent / "9.json", samples[1]))
    assert done.returncode == 2 and "does not exist" in done.stderr


@pytest.fixture
def browser():
    if find() is None and os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER=1, but there is none: {APT}")
    if find() is None:
        pytest.skip(f"there is no browser: {APT}")
    with Browser() as browser:
        yield browser


def test_the_page_in_a_browser(samples, tmp_path, browser):
    """Samples are seen, every filter works under a hand, and nothing is fetched."""
    page = tmp_path / "page.html"
    assert show(samples, "--html", str(page)).returncode == 0
    browser.open(page)

    def seen():
        abouts = browser.value(
            "[...document.querySelectorAll('article .about')].map(e => e.textContent)"
        )
        count = browser.value("document.getElementById('count').textContent")
        assert count == f"{len(abouts)} of 2 samples"
        return [int(text.split()[1]) for text in abouts]

    def colours():
        tokens = "[...document.querySelectorAll('.token')]"
        return browser.value(tokens + ".map(e => getComputedStyle(e).backgroundColor)")

    assert seen() == [0, 1]
    assert browser.value("document.querySelector('.prompt').checkVisibility()")
    assert browser.value("document.querySelectorAll('.token').length") == 3
    for field, text, left in (
        ("minReward", "0.5", [0]),
        ("maxReward", "0.5", [1]),
        ("minLength", "2", [0]),
        ("maxLength", "1", [1]),
    ):
        browser.type(field, text)
        assert seen() == left, field
        browser.type(field, "")
        assert seen() == [0, 1], field
    by_advantage = colours()
    assert by_advantage[0] != by_advantage[2]
    assert by_advantage[1].endswith(", 0)")  # a token that is not trained on has no colour
    browser.press("ArrowDown", 40, "colour")  # the loss mask
    assert colours() != by_advantage
    browser.press("ArrowDown", 40, "status")  # the first that there is
    assert seen() == [0]
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.errors == []
