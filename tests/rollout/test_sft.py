"""Batches for supervised fine-tuning, from data alone."""

import numpy as np
import pytest

from spmd_rl.data.template import load_tokenizer
from tests.models import tiny_model
from tests.rollout.collecting import collecting, config, sums

SFT = {"loss_type": "sft_loss"}
ONE = {"n_samples_per_prompt": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(tiny_model("qwen3", positions=1024)))


def texts(batch, tokenizer):
    """(whole, trained) text of every sample."""
    found = []
    token, response = 0, 0
    for total, length in zip(batch.total_lengths, batch.response_lengths, strict=True):
        tokens = batch.tokens[token : token + total]
        mask = batch.loss_mask[response : response + length].astype(bool)
        found.append((tokenizer.decode(tokens), tokenizer.decode(tokens[-length:][mask])))
        token, response = token + total, response + length
    return found


def test_prompt_and_label_with_template(tmp_path, tokenizer):
    with collecting(config(tmp_path, algo=SFT, rollout=ONE), tmp_path) as collector:
        rollout = collector.collect(0, 0)
    whole, trained = texts(rollout.batch, tokenizer)[1]
    assert whole == (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert trained == "2<|im_end|>\n"
    assert rollout.batch.rollout_log_probs is None
    assert rollout.metrics["rollout/response_len/min"] > 0


def test_prompt_and_label_as_text(tmp_path, tokenizer):
    plain = {"apply_chat_template": False}
    with collecting(config(tmp_path, algo=SFT, rollout=ONE, data=plain), tmp_path) as collector:
        batch = collector.collect(0, 0).batch
    assert texts(batch, tokenizer)[1] == ("What is 1+1?2<|im_end|>", "2<|im_end|>")


def test_chat_messages(tmp_path, tokenizer):
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    data = {"label_key": None, "apply_chat_template": False}
    cfg = config(tmp_path, [{"prompt": chat}] * 4, algo=SFT, rollout=ONE, data=data)
    with collecting(cfg, tmp_path) as collector:
        batch = collector.collect(0, 0).batch
    assert texts(batch, tokenizer)[0][1] == "2<|im_end|>\n4<|im_end|>\n"


def test_batches_follow_the_data_and_can_be_taken_up(tmp_path):
    cfg = config(tmp_path, sums(10), algo=SFT, rollout=ONE, data={"rollout_shuffle": True})
    with collecting(cfg, tmp_path) as collector:
        whole = [collector.collect(k, 0) for k in range(5)]
        collector.load_state(whole[1].state)  # what was made ahead is forgotten
        again = [collector.collect(k, 0) for k in (2, 3)]
    assert whole[4].state["epoch_id"] == 1
    for mine, theirs in zip(again, whole[2:], strict=False):
        np.testing.assert_array_equal(mine.batch.tokens, theirs.batch.tokens)
        assert mine.state == theirs.state


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        ([{"prompt": "x"}], {"apply_chat_template": False}, "set data.label_key"),
        ([{"prompt": "x"}], {}, "row 0 has no assistant turn"),
    ],
)
def test_nothing_to_learn_from(tmp_path, rows, data, words):
    cfg = config(tmp_path, rows, algo=SFT, rollout=ONE, data={"label_key": None} | data)
    with collecting(cfg, tmp_path) as collector, pytest.raises(ValueError, match=words):
        collector.collect(0, 0)
