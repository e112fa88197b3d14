"""Prompts: columns, templates, length limit, order and resumption."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_rl.data.prompts import Columns, PromptSet, PromptSource, prompt_limit
from spmd_rl.data.rows import DataError
from spmd_rl.data.template import Template, load_tokenizer
from tests.models import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(tiny_model("qwen3", positions=1024)))


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(rows, apply=False, kwargs=None, max_length=None, raw=False, **columns):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        template = Template(tokenizer, apply, kwargs)
        return PromptSet(str(path), Columns(**columns), template, max_length, raw=raw)

    return make


def test_gsm8k_rows_as_they_are(make):
    rows = [{"question": "How many?", "answer": "So 70+2 = 72.\n#### 72"}]
    prompt = make(rows, apply=True, input_key="question", label_key="answer")[0]
    assert prompt.text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.label.endswith("#### 72")


def test_tokens_are_the_texts(make, tokenizer):
    prompts = make([{"input": "What is 3+4?"}, {"input": "and 5?"}])
    for index, text in enumerate(["What is 3+4?", "and 5?"]):
        assert prompts[index].text == text
        assert prompts[index].tokens == tokenizer.encode(text, add_special_tokens=False)


def test_chat_messages(make):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert "Be brief.<|im_end|>" in make([{"input": chat}], apply=True)[0].text
    untouched = make([{"input": chat}])[0]
    assert untouched.text == chat and untouched.tokens == []


def test_metadata_and_tools(make):
    tools = [{"name": "calculator"}]
    rows = [
        {"input": "a", "metadata": {"k": 1}, "tools": tools},
        {"input": "b", "metadata": json.dumps({"k": 2}), "tools": json.dumps(tools)},
        {"input": "c", "metadata": None},
        {"input": "d"},
    ]
    prompts = make(rows)
    assert prompts[0].metadata == {"k": 1, "tools": tools}
    assert prompts[1].metadata == {"k": 2, "tools": tools}
    assert prompts[2].metadata == prompts[3].metadata == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "answer": 1}, "no 'input' .data.input_key., its keys are answer, prompt"),
        ({"input": "x"}, "no 'label' .data.label_key."),
        ({"input": 7, "label": 1}, "neither text nor a list of messages"),
        ({"input": [], "label": 1}, "neither text nor a list of messages"),
        ({"input": ["x"], "label": 1}, "neither text nor a list of messages"),
        ({"input": "x", "label": 1, "metadata": "{"}, "data.metadata_key. is text that is not"),
        ({"input": "x", "label": 1, "metadata": [1]}, "data.metadata_key. is no object"),
        ({"input": "x", "label": 1, "tools": "{"}, "tools in 'tools' that are not JSON"),
    ],
)
def test_bad_rows_are_named(make, row, words):
    with pytest.raises(DataError, match=f"line 2: .*{words}"):
        make([{"input": "fine", "label": 1}, row], label_key="label")


def test_long_prompts_are_dropped_and_counted(make):
    rows = [{"input": "1" * length} for length in (3, 9, 5, 12, 4)]
    prompts = make(rows, max_length=5)
    assert [prompt.text for prompt in map(prompts.__getitem__, range(len(prompts)))] == [
        "111",
        "11111",
        "1111",
    ]
    assert "2 of 5 prompts are longer than 5 tokens" in prompts.notes[-1]
    with pytest.raises(DataError, match="every prompt is longer than 2 tokens"):
        make(rows, max_length=2)


def test_limits():
    assert prompt_limit(None, None) is None
    assert prompt_limit(10, None) == 10
    assert prompt_limit(None, 10) == 9
    assert prompt_limit(10, 10) == 9


def test_a_template_is_needed_to_apply_one(tokenizer):
    plain = load_tokenizer(str(tiny_model("qwen3", positions=1024)))
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Template(plain, True)


def walk(source, count):
    return [(group[0].prompt, source.epoch_id) for group in source.draw(count)]


def test_order_is_slimes(make):
    """random.seed(seed + epoch), a permutation of the file's order, the tail before the head."""
    prompts = make([{"input": str(i)} for i in range(10)])
    expected = []
    for epoch in range(3):
        order = list(range(10))
        random.seed(42 + epoch)
        random.shuffle(order)
        expected += [str(i) for i in order]
    source = PromptSource(prompts, n_samples=1, shuffle=True, seed=42)
    drawn = [group[0].prompt for size in (4, 4, 4, 11, 7) for group in source.draw(size)]
    assert drawn == expected


def test_groups_are_equal_copies_with_counted_indices(make):
    prompts = make([{"input": str(i), "metadata": {"list": []}} for i in range(3)])
    source = PromptSource(prompts, n_samples=4, shuffle=False, seed=0)
    groups = source.draw(5)
    assert [[s.index for s in group] for group in groups[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [group[0].group_index for group in groups] == [0, 1, 2, 3, 4]
    assert [group[0].prompt for group in groups] == ["0", "1", "2", "0", "1"]
    groups[0][0].metadata["list"].append(1)
    groups[0][0].tokens.append(1)
    assert groups[0][1].metadata == {"list": []} == groups[3][0].metadata
    assert groups[0][1].tokens == groups[3][0].tokens


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8), st.lists(st.integers(1, 9), max_size=6), st.integers(1, 12), st.booleans()
)
def test_a_walk_goes_on_where_its_state_says(size, before, after, shuffle):
    prompts = [type("P", (), {"text": str(i), "tokens": [i], "label": i, "metadata": {}})
               for i in range(size)]  # fmt: skip
    source = PromptSource(prompts, n_samples=2, shuffle=shuffle, seed=7)  # type: ignore[arg-type]
    for count in before:
        source.draw(count)
    state = json.loads(json.dumps(source.state()))
    other = PromptSource(prompts, n_samples=2, shuffle=shuffle, seed=7)  # type: ignore[arg-type]
    other.load_state(state)
    assert source.draw(after) == other.draw(after)
    assert source.state() == other.state()
