"""Spans of several ranks end up in one page that needs no network."""

import json
import re

from spmd_rl.timeline import Timeline, draw


def test_lanes_and_spans(tmp_path):
    for rank in (0, 2, 10):
        lane = Timeline(tmp_path, f"rank {rank}")
        lane.add("train", 1000.0 + rank, 1003.0 + rank, rollout=rank)
        with lane.span("</script>"):
            pass
        lane.close()
    page = draw(tmp_path).read_text()
    assert "http" not in page
    assert page.count("</script>") == 1
    lanes = json.loads(re.search(r"const lanes = (\[.*\]), colours", page)[1])
    assert [lane["lane"] for lane in lanes] == ["rank 0", "rank 2", "rank 10"]
    assert lanes[1]["spans"][0] == {"name": "train", "at": 2.0, "for": 3.0, "rollout": 2}


def test_a_span_that_raises_is_recorded(tmp_path):
    lane = Timeline(tmp_path, "rank 0")
    try:
        with lane.span("train"):
            raise KeyError
    except KeyError:
        pass
    assert '"train"' in draw(tmp_path).read_text()


def test_nothing_recorded(tmp_path):
    assert draw(tmp_path) is None
