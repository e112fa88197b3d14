"""One row of the parity table, as a user asks for it: what cannot be is said, the rest is right."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.models import ROOT


def test_the_widest_layout(tmp_path):
    families = ["glm4", "qwen3_moe", "moonlight"]
    command = [sys.executable, "tools/check_parity.py", "--families", ",".join(families)]
    command += ["--layouts", "ep2_tp2_cp2", "--no-bf16", "--json", str(tmp_path / "found")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())["cells"]
    assert "the model has no experts" in found.pop("glm4 ep2_tp2_cp2")["refused"]
    assert "glm4" in done.stdout and "the model has no experts" in done.stdout
    assert set(found) == {f"{name} ep2_tp2_cp2" for name in families[1:]}
    for cell in found.values():
        assert max(cell["logits"], cell["grads"]) <= 1e-5 and not cell["differ"]
