"""Which requests go on from which answers."""

from __future__ import annotations

import numpy as np
import pytest

from spmd_rl.agent.record import Record
from spmd_rl.agent.turns import Turns
from spmd_rl.data.template import load_tokenizer
from spmd_rl.rollout.answers import Generated
from spmd_rl.types import Sample, Status
from tests.agent.caller import TEMPLATE
from tests.models import tiny_model

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def turns():
    tokenizer = load_tokenizer(str(tiny_model("qwen3", positions=1024)))
    tokenizer.chat_template = TEMPLATE.read_text()
    return Turns(tokenizer)


def said(turns, text, finish="stop", version=1, experts=None):
    """An answer whose tokens are one letter each, as a tokenizer would not cut them."""
    ids = [token for letter in text for token in turns.template.encode(letter)]
    ids += [turns.template.tokenizer.eos_token_id] if finish == "stop" else []
    versions = [version] * len(ids)
    return Generated(text, ids, [-0.5] * len(ids), versions, finish, 0, 0, experts)


def ask(record, messages, text, tools=(), **more):
    prompt = record.prompt(messages, list(tools))
    record.add(prompt, said(record.turns, text, **more), {"role": "assistant", "content": text})
    return prompt


def made(record):
    return record.samples(Sample(index=7), record.turns.template.tokenizer.decode)


def test_sampled_tokens_are_gone_on_with_as_they_are(turns):
    record = Record(turns)
    first = ask(record, [USER], "user")  # one token to the tokenizer, four as sampled
    again = [USER, {"role": "assistant", "content": " user\n", "refusal": None}, USER]
    second = ask(record, again, "x", finish="length", version=2)
    answer = said(turns, "user").tokens
    assert turns.template.encode("user") != answer[:-1]
    assert second.tokens[: len(first.tokens) + len(answer)] == first.tokens + answer
    rendered = turns.opening([USER, {"role": "assistant", "content": "user"}, USER])
    decode = turns.template.tokenizer.decode
    assert decode(second.tokens) == decode(rendered)
    [sample] = made(record)
    between = len(second.tokens) - len(first.tokens) - len(answer)
    assert sample.loss_mask == [1] * len(answer) + [0] * between + [1]
    assert sample.weight_versions == [1] * (len(answer) + between) + [2]
    assert sample.rollout_log_probs[len(answer) : -1] == [0.0] * between
    assert sample.status is Status.TRUNCATED and sample.response_length == len(sample.loss_mask)
    assert sample.metadata["turns"] == 2


def test_an_answer_cut_short_is_closed_by_the_template(turns):
    record = Record(turns)
    ask(record, [USER], "abc", finish="length")
    prompt = record.prompt([USER, {"role": "assistant", "content": "abc"}, USER], [])
    rendered = turns.opening([USER, {"role": "assistant", "content": "abc"}, USER])
    decode = turns.template.tokenizer.decode
    assert decode(prompt.tokens) == decode(rendered)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "a"}, USER],
        [USER, {"role": "assistant", "content": "b"}, USER],
        [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER],
    ],
)
def test_a_changed_history_begins_another_sample(turns, messages):
    record = Record(turns)
    ask(record, [USER], "a")
    prompt = ask(record, messages, "c")
    assert prompt.parent is None and prompt.tokens == turns.opening(messages)
    one, two = made(record)
    assert sum(one.loss_mask) == sum(two.loss_mask) == 2
    assert one.index == two.index == 7


def test_other_tools_begin_another_sample(turns):
    record = Record(turns)
    ask(record, [USER], "a")
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    after = [USER, {"role": "assistant", "content": "a"}, USER]
    assert record.prompt(after, [tool]).parent is None
    assert record.prompt(after, []).parent is not None


def test_a_shared_answer_is_trained_on_once(turns):
    record = Record(turns)
    ask(record, [USER], "a")
    after = [USER, {"role": "assistant", "content": "a"}]
    for question, answer in (("1", "b"), ("2", "c")):
        ask(record, [*after, {"role": "user", "content": question}], answer)
    one, two = made(record)
    assert sum(one.loss_mask) == 4 and sum(two.loss_mask) == 2
    assert one.loss_mask[:2] == [1, 1] and two.loss_mask[:2] == [0, 0]
    assert two.rollout_log_probs[:2] == [-0.5, -0.5]


def test_experts_of_a_path_are_joined(turns):
    record = Record(turns)
    length = len(turns.opening([USER]))

    def chosen(count, value):
        return np.full((count, 1, 2), value, np.uint8)

    ask(record, [USER], "a", experts=chosen(length + 1, 1))
    after = record.prompt([USER, {"role": "assistant", "content": "a"}, USER], [])
    assert after.known_experts == length + 1
    new = len(after.tokens) + 2 - 1 - after.known_experts
    answer = said(turns, "b", experts=chosen(new, 2))
    record.add(after, answer, {"role": "assistant", "content": "b"})
    [sample] = made(record)
    experts = sample.rollout_routed_experts
    assert len(experts) == len(sample.tokens) - 1
    assert experts[:, 0, 0].tolist() == [1] * (length + 1) + [2] * new
