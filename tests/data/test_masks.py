"""What of a conversation is trained on, message by message, on the models' own chat templates.

Expectations are written out by hand as pieces of text. They are checked as token ids of a tiny
tokenizer, and of the real one where SPMD_RL_QWEN_TOKENIZER names its folder.
"""

import os
from pathlib import Path

import pytest

from spmd_rl.data.masks import MultiTurnLossMaskGenerator, get_response_lengths
from spmd_rl.data.rows import DataError
from spmd_rl.data.template import load_tokenizer
from tests.models import tiny_model

TEMPLATES = Path(__file__).parent / "templates"
QWEN = os.environ.get("SPMD_RL_QWEN_TOKENIZER")
TOKENIZERS = ["tiny", pytest.param("qwen", marks=pytest.mark.skipif(not QWEN, reason="not given"))]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
# Every kind of message: two calls at once, results in a row, words before a call, thoughts.
AGENT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2, 3+4?"},
    {"role": "assistant", "content": "", "tool_calls": [call("add", a=1, b=2), call("add", a=3)]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "wrong"},
    {"role": "assistant", "content": "Again.", "tool_calls": [call("add", a=3, b=4)]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "<think>\nDone.\n</think>\n\n3 and 7"},
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": "10"},
]
TOOLS_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "parameters": {"type": "object", '
    '"properties": {}}}}\n</tools>\n\nFor each function call, return a json object with function '
    "name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>\n'
)
AGAIN = (
    'Again.\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>\n'
)
RESULTS = (
    "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\nwrong\n"
    "</tool_response><|im_end|>\n"
)
HEADER = "<|im_start|>assistant\n"


def agent_pieces(thought=""):
    """[(text, trained)] of AGENT. `thought`: what the template puts before each answer."""
    return [
        ("<|im_start|>system\nBe brief.\n\n" + TOOLS_TEXT, 0),
        ("<|im_start|>user\n1+2, 3+4?<|im_end|>\n" + HEADER, 0),
        (thought + CALLS, 1),
        (RESULTS + HEADER, 0),
        (thought + AGAIN, 1),
        ("<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n" + HEADER, 0),
        ("<think>\nDone.\n</think>\n\n3 and 7<|im_end|>\n", 1),
        ("<|im_start|>user\nSum?<|im_end|>\n" + HEADER, 0),
        (thought + "10<|im_end|>\n", 1),
    ]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    path = QWEN if request.param == "qwen" else tiny_model("qwen3", positions=1024)
    return load_tokenizer(str(path))


def with_template(tokenizer, name):
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def masked(tokenizer, pieces):
    ids, mask = [], []
    for text, trained in pieces:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        mask += [trained] * len(tokens)
    return ids, mask


def turns(messages):
    """The conversation as it grows: its context and the next answer, again and again."""
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [messages[:end] for end in ends]


@pytest.mark.parametrize(
    ("template", "kind", "thought"),
    [
        ("qwen2_5", "qwen", ""),
        ("qwen2_5", "qwen3", ""),
        ("qwen3_instruct_2507", "qwen", ""),
        ("qwen3_instruct_2507", "qwen3", ""),
        ("qwen3", "qwen3", "<think>\n\n</think>\n\n"),
        ("qwen3_training", "qwen3", "<think>\n\n</think>\n\n"),
        ("qwen3_training", "qwen", "<think>\n\n</think>\n\n"),
        ("qwen3_training", "qwen3_5", "<think>\n\n</think>\n\n"),
    ],
)
def test_every_kind_of_message(tokenizer, template, kind, thought):
    generator = MultiTurnLossMaskGenerator(with_template(tokenizer, template), kind)
    pieces = agent_pieces(thought)
    if kind == "qwen3_5":  # a thought is begun by the prompt, not by the model
        pieces = [
            part
            for text, trained in pieces
            for part in ([("<think>\n", 0), (text[8:], 1)] if trained else [(text, 0)])
        ]
    expected = masked(tokenizer, pieces)
    assert generator.get_loss_mask(AGENT, [TOOL]) == expected
    grown = [generator.get_loss_mask(part, [TOOL]) for part in turns(AGENT)]
    if kind == "qwen3_5":
        return  # what came before may look otherwise
    for ids, mask in grown:  # each turn only adds to the one before
        assert (ids, mask) == (expected[0][: len(ids)], expected[1][: len(ids)])


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507", "qwen3_training"])
def test_at_once_and_message_by_message_are_the_same_ids(tokenizer, template):
    with_template(tokenizer, template)
    whole = tokenizer.apply_chat_template(AGENT, tools=[TOOL], tokenize=False)
    ids, _ = MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(AGENT, [TOOL])
    assert ids == tokenizer.encode(whole, add_special_tokens=False)
    ids, _ = MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(AGENT[1:])
    whole = tokenizer.apply_chat_template(AGENT[1:], tokenize=False)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)


def test_the_mask_is_what_the_template_marks(tokenizer):
    """TRL's training template says itself which tokens are the assistant's."""
    with_template(tokenizer, "qwen3_training")
    marked = tokenizer.apply_chat_template(
        AGENT, tools=[TOOL], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(AGENT, [TOOL])
    assert (ids, mask) == (marked["input_ids"], marked["assistant_masks"])


@pytest.mark.skipif(not QWEN, reason="SPMD_RL_QWEN_TOKENIZER is not given")
def test_ids_of_the_real_tokenizer():
    tokenizer = with_template(load_tokenizer(str(QWEN)), "qwen3")
    ids, mask = MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    )
    start, end, line, empty, think, thought = 151644, 151645, 198, 271, 151667, 151668
    prompt = [start, 872, line, 6023, end, line, start, 77091, line]
    assert ids == [*prompt, think, empty, thought, empty, 562, end, line]
    assert mask == [0] * 9 + [1] * 7


def test_history_loses_its_thoughts_in_qwen3_5(tokenizer):
    """As in the template: before the last question only what was said stays."""
    with_template(tokenizer, "qwen3")
    chat = [
        CHAT[1],
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
        CHAT[3],
        {"role": "assistant", "content": "<think>\nToo.\n</think>\n\n4"},
    ]
    generator = MultiTurnLossMaskGenerator(tokenizer, "qwen3_5")
    assert generator.get_loss_mask(chat) == masked(
        tokenizer,
        [
            ("<|im_start|>user\n1+1?<|im_end|>\n" + HEADER, 0),
            ("2<|im_end|>\n", 1),
            ("<|im_start|>user\n2+2?<|im_end|>\n" + HEADER + "<think>\n", 0),
            ("Too.\n</think>\n\n4<|im_end|>\n", 1),
        ],
    )
    with pytest.raises(DataError, match="a message contains it"):
        generator.get_loss_mask([{"role": "user", "content": HEADER}, *chat[1:]])


def test_a_lost_thought_is_told(tokenizer):
    """Rendered alone, an answer loses its thoughts in Qwen3's template."""
    with_template(tokenizer, "qwen3")
    chat = [CHAT[1], {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"}]
    with pytest.raises(DataError, match="'Easy.'.*set data.loss_mask_type: qwen3"):
        MultiTurnLossMaskGenerator(tokenizer, "qwen").get_loss_mask(chat)
    chat[1] = {"role": "assistant", "content": "2", "reasoning_content": "Easy."}
    with pytest.raises(DataError, match="'Easy.'"):
        MultiTurnLossMaskGenerator(tokenizer, "qwen").get_loss_mask(chat)
    text = "<think>\nEasy.\n</think>\n\n2<|im_end|>\n"
    assert MultiTurnLossMaskGenerator(tokenizer, "qwen3").get_loss_mask(chat) == masked(
        tokenizer, [("<|im_start|>user\n1+1?<|im_end|>\n" + HEADER, 0), (text, 1)]
    )


def test_the_last_answer_alone(tokenizer):
    with_template(tokenizer, "qwen3_instruct_2507")
    prompt = tokenizer.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    generator = MultiTurnLossMaskGenerator(tokenizer, "distill_qwen")
    pieces = [(prompt, 0), (f"4{tokenizer.eos_token}", 1)]
    assert generator.get_loss_mask(CHAT) == masked(tokenizer, pieces)
    left_out = [*CHAT[:4], CHAT[4] | {"step_loss_mask": 0}]
    assert sum(generator.get_loss_mask(left_out)[1]) == 0


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "qwen3_5"])
def test_a_turn_can_be_left_out(tokenizer, kind):
    with_template(tokenizer, "qwen3_instruct_2507")
    chat = [*CHAT[:2], CHAT[2] | {"step_loss_mask": 0}, *CHAT[3:]]
    generator = MultiTurnLossMaskGenerator(tokenizer, kind)
    ids, mask = generator.get_loss_mask(chat)
    assert ids == generator.get_loss_mask(CHAT)[0]
    trained = [token for token, one in zip(ids, mask, strict=True) if one]
    assert trained == tokenizer.encode("4<|im_end|>\n", add_special_tokens=False)


def test_template_arguments_reach_the_header(tokenizer):
    """Without thinking the prompt holds an empty thought, which the model does not write."""
    with_template(tokenizer, "qwen3")
    generator = MultiTurnLossMaskGenerator(tokenizer, "qwen3", {"enable_thinking": False})
    opened = HEADER + "<think>\n\n</think>\n\n"
    assert generator.get_loss_mask(CHAT[1:3]) == masked(
        tokenizer,
        [("<|im_start|>user\n1+1?<|im_end|>\n" + opened, 0), ("2<|im_end|>\n", 1)],
    )


def test_an_unknown_type_is_told(tokenizer):
    with pytest.raises(ValueError, match="choose one of qwen, qwen3, qwen3_5, distill_qwen"):
        MultiTurnLossMaskGenerator(tokenizer, "llama")


def test_response_lengths():
    assert get_response_lengths([[0, 0, 1, 0, 1], [0, 0], [1], []]) == [3, 0, 1, 0]
