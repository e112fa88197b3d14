"""GSM8K results are read from labels and responses alike."""

import asyncio

import pytest

from examples.gsm8k.reward import result, score
from spmd_rl.types import Sample

LABEL = "She had 500*2 = <<500*2=1000>>1000, so 1000+72 = 1072 in all.\n#### 1,072"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("It is 3.\n#### 1072", 1.0),
        ("#### $1,072", 1.0),
        (r"so \boxed{1072} apples, not 7", 1.0),
        ("that makes 1072.", 1.0),
        ("#### 1072 or maybe #### 1073", 0.0),
        ("no idea", 0.0),
        ("-1072", 0.0),
    ],
)
def test_score(response, reward):
    assert asyncio.run(score(None, Sample(response=response, label=LABEL))) == reward


def test_result_of_labels():
    assert result("x\n#### -3.5") == -3.5
    assert result("nothing") is None
