"""What of a conversation is trained on."""

import pytest

from spmd_rl.data.masks import MultiTurnLossMaskGenerator, get_response_lengths
from spmd_rl.data.template import Template, load_tokenizer
from tests.models import tiny_model

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def template():
    return Template(load_tokenizer(str(tiny_model("qwen3", positions=1024))), True)


def trained(template, messages):
    tokens, mask = MultiTurnLossMaskGenerator(template).get_loss_mask(messages)
    assert len(tokens) == len(mask)
    shown = template.tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    return tokens, mask, shown


def test_every_assistant_turn_with_its_end_and_nothing_else(template):
    tokens, _, shown = trained(template, CHAT)
    assert shown == "2<|im_end|>\n4<|im_end|>\n"
    assert template.tokenizer.decode(tokens) == template.chat(CHAT)


def test_the_answer_is_encoded_as_it_is_generated(template):
    """Header and answer apart: the prompt of a rollout ends with the header."""
    tokens, mask, _ = trained(template, CHAT[1:3])
    prompt = template.encode(template.render("1+1?"))
    assert tokens[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))


def test_a_turn_can_be_left_out(template):
    chat = [*CHAT[:2], CHAT[2] | {"step_loss_mask": 0}, *CHAT[3:]]
    assert trained(template, chat)[2] == "4<|im_end|>\n"


def test_response_lengths():
    assert get_response_lengths([[0, 0, 1, 0, 1], [0, 0], [1], []]) == [3, 0, 1, 0]


def test_templates_that_change_history(template):
    """Qwen3 strips the thoughts of earlier turns and adds empty ones to the last: every message is
    rendered by itself, so a conversation gives the same tokens whatever follows a turn."""
    changing = Template(load_tokenizer(str(tiny_model("qwen3", positions=1024))), True)
    changing.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    chat = [CHAT[1], {"role": "assistant", "content": "<think>a</think>2"}, CHAT[3], CHAT[4]]
    assert trained(changing, chat)[2] == "<think>a</think>2<|im_end|>\n4<|im_end|>\n"
    assert trained(template, chat)[0] == trained(changing, chat)[0]
