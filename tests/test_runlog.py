"""What the run log does with a sentence among the metrics."""

from __future__ import annotations

import json
from types import SimpleNamespace

from spmd_rl.runlog import RunLog
from tests.config.inputs import good


def test_an_alarm_is_said_and_is_no_metric(tmp_path, capfd):
    from spmd_rl.config.schema import Config

    sections = good(tmp_path)
    sections.setdefault("logging", {})["progress"] = "plain"
    log = RunLog(Config.model_validate(sections), tmp_path, 2, 0)
    stats = {"train/loss": [0.5], "mismatch/alarm": 1.0, "alarm": "the engine is behind"}
    log.rollout(0, SimpleNamespace(metrics={}), stats)
    log.metrics.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["mismatch/alarm"] == 1 and "alarm" not in json.loads(line)
    out = capfd.readouterr()
    assert "rollout 0: the engine is behind" in out.out + out.err
