"""`ifbench` and `format`: each instruction with an answer that follows it and one that does not."""

import time

import pytest

from spmd_rl.rewards.form import form
from spmd_rl.rewards.ifbench import follows, ifbench
from spmd_rl.rewards.ifeval import RULES, sentences

STORY = " ".join(f"{chr(65 + n)}pples fall." for n in range(26))
PALINDROMES = "level radar civic kayak madam refer rotor tenet stats minim"
CSV = "ID,Country,City,Year,Count\n" + "1,a,b,2000,3\n" * 7
# id, kwargs, follows, does not
CASES = [
    ("keywords:existence", {"keywords": ["Sun", "moon"]}, "The sun. The Moon.", "The sun."),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a a", "a"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a a"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat!"),
    ("keywords:letter_frequency",
     {"letter": "X", "let_frequency": 2, "let_relation": "at least"}, "xX", "x"),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Hund.", "This is a dog."),
    ("language:response_language", {"language": "en"}, "This is the dog.", "C'est le chien."),
    ("language:response_language", {"language": "hi"}, "यह एक घर है", "हे एक घर आहे आणि ते"),
    ("language:response_language", {"language": "ur"}, "یہ ایک گھر ہے", "این یک خانه است و در"),
    ("language:response_language", {"language": "ko"}, "안녕하세요", "hello"),
    ("language:response_language", {"language": "ja"}, "これは本です", "这是一本书"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     "Mr. J. Smith came. \"He left!\"", "Mr. J. Smith came, e.g. home"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     "a\n***\nb\n***", "a\n***\n***\nb"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, "a\n\nSo, b", "a\n\nbut b"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP.S. b", "a b"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\nP.P.S b", "a\nP.S. b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b\n**c**", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1\na"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\nb", "<< >>\nb"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it\nit", "it"),
    ("startend:end_checker", {"end_phrase": "The end."}, "a. The end.\"", "The end. a"),
    ("startend:quotation", {}, "\"a\"", "\"a"),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, "A BC d", "A b c"),
    ("change_case:english_capital", {}, "ALL OF IT", "ALL OF it"),
    ("change_case:english_lowercase", {}, "all of it", "All of it"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "a b c", "a b c d"),
    ("count:unique_word_count", {"N": 2}, "a A b.", "a a A."),
    ("count:numbers", {"N": 2}, "1,000 and 3.5", "1"),
    ("count:conjunctions", {"small_n": 2}, "a and b, But c", "a and b and c"),
    ("count:pronouns", {"N": 2}, "She said it", "Ann said it"),
    ("count:punctuation", {}, "a. b, c! d? e; f: g?!", "a. b, c! d; f: g?!"),
    ("count:keywords_multiple",
     {"keyword1": "a", "keyword2": "b", "keyword3": "c", "keyword4": "d", "keyword5": "e"},
     "a b b c c c d d d d d e e e e e e e", "a b b c c c d d d d d e e e e e e"),
    ("count:words_japanese", {"N": 2}, "a 本 b 日", "a b c 日"),
    ("ratio:sentence_type", {}, "A b. C d. E f?", "A b. E f?"),
    ("ratio:sentence_balance", {}, "A b. \"C d!\" E f?", "A b. E f?"),
    ("ratio:sentence_words", {}, "Ab cd. Ef gh. Ij kl.", "Ab cd. Ef gh. Ab kl."),
    ("words:alphabet", {}, "Yes, zebras always bark.", "Yes, always."),
    ("words:vowel", {}, "a tent is it", "a tent is out"),
    ("words:consonants", {}, "strong winds", "strong a"),
    ("words:palindrome", {}, PALINDROMES, PALINDROMES[:-6]),
    ("words:prime_lengths", {}, "we see birds", "we see bird"),
    ("words:repeats", {"small_n": 2}, "a A b", "a a a"),
    ("words:no_consecutive", {}, "big cat", "big bat"),
    ("words:last_first", {}, "I like tea. Tea is hot.", "I like tea. It is hot."),
    ("words:paragraph_last_first", {}, "Go we go.\n\nA b a", "Go we"),
    ("words:keywords_specific_position", {"keyword": "tea", "n": 2, "m": 3},
     "So it is. I like tea.", "I like tea."),
    ("words:words_position", {"keyword": "tea"}, "A tea is a tea then.", "A tea is a pot then."),
    ("sentence:keyword", {"word": "tea", "N": 2}, "So be it. I like Tea!", "I like tea. So be it."),
    ("sentence:increment", {"small_n": 1}, "Go on. We go on.", "Go on. We go on and on."),
    ("format:parentheses", {}, "([{([a])}])", "([{([a)}])"),
    ("format:options", {"options": "yes/no/maybe"}, "Yes.", "Yes, surely"),
    ("format:options", {"options": "a), b), c), d)"}, "b)", "b"),
    ("format:newline", {}, "one\ntwo", "one two"),
    ("format:line_indent", {}, "a\n b\n  c", "a\n b\n c"),
    ("format:list", {"sep": "!?!?"}, "!?!? a\n!?!? b", "- a\n- b"),
    ("format:thesis", {}, "<i>So</i> it is", "<i> </i> it is"),
    ("format:sub-bullets", {}, "* a\n - b\n* c\n - d", "* a\n - b\n* c"),
    ("format:no_bullets_bullets", {}, "A b. C d.\n* e\n* f", "* e\n* f\nA b. C d."),
    ("format:quote_unquote", {}, "\"So\" means so.", "It means \"so\"."),
    ("format:title_case", {}, "All Of It", "All of It"),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", "My Answer:"),
    ("format:no_whitespace", {}, "a-b", "a b"),
    ("repeat:repeat_change", {"prompt_to_repeat": "Say it now"}, "Tell it now", "Say it now"),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "a"),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2},
     "b c", "b c d"),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "14, 21"),
    ("custom:character_reverse", {}, "elgae dlab ehT", "bald eagle"),
    ("custom:sentence_alphabet", {}, STORY, STORY[12:]),
    ("custom:csv_city", {}, CSV.strip(), CSV.strip()[3:]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "right", "wrong"), CASES)
def test_each_instruction(name, kwargs, right, wrong):
    assert follows(right, name, kwargs)
    assert not follows(wrong, name, kwargs)


def test_every_rule_has_a_case():
    assert {name for name, *_ in CASES} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_long_text_takes_little_time(name):
    kwargs = next(kwargs for known, kwargs, *_ in CASES if known == name)
    start = time.monotonic()
    for piece in ("a. ", "*", "[", "<<", "(", '."', "\n\n", "x", "'", "*** ", "- "):
        follows(piece * (100_000 // len(piece)), name, kwargs)
    assert time.monotonic() - start < 20  # 0.5 s on a quiet machine; a square would take hours


def test_all_must_be_followed():
    metadata = {
        "instruction_id_list": ["punctuation:no_comma", "count:numbers"],
        "kwargs": [{"keywords": None}, {"N": 1}],  # as the data has it: what is not used is null
    }
    assert ifbench("a 1", None, metadata) == 1.0
    assert ifbench("<think>1, 2</think> a 1", None, metadata) == 1.0
    assert ifbench("a, 1", None, metadata) == 0.0
    assert ifbench("", None, {"instruction_id_list": ["punctuation:no_comma"]}) == 0.0


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "needs instruction_id_list"),
        ({"instruction_id_list": ["a:b"]}, "instruction a:b is unknown to rm_type ifbench"),
        ({"instruction_id_list": ["count:numbers"], "kwargs": []}, None),
        ({"instruction_id_list": ["count:numbers"], "kwargs": [{}, {}]}, "1 entries .* and 2 in"),
        ({"instruction_id_list": ["count:numbers"], "kwargs": [{"M": 1}]}, "do not fit"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 1, "relation": "more than"}],
            },
            "'less than' or 'at least'",
        ),
    ],
)
def test_faults(metadata, words):
    with pytest.raises(ValueError, match=words or "do not fit"):
        ifbench("a", None, metadata)


def test_sentences():
    text = 'Dr. A. Smith left at 3.15 p.m. "Why?" he asked. No one knew...'
    assert sentences("It is. So? Yes!") == ["It is.", "So?", "Yes!"]
    assert sentences("no end") == ["no end"] and sentences(" ") == []
    assert sentences(text)[0].startswith("Dr. A. Smith left")


@pytest.mark.parametrize(
    ("response", "prompt", "reward"),
    [
        ("<think>a</think><answer>b</answer>", "", 1.0),
        (" <think>\na\n</think>\n<answer>b</answer>\n", "", 1.0),
        ("a</think><answer>b</answer>", "Q: <think>\n", 1.0),
        ("a</think><answer>b</answer>", "Q:", 0.0),
        ("<think>a</think>b", "", 0.0),
        ("<think></think><answer>b</answer>", "", 0.0),
        ("<think>a</think><answer> </answer>", "", 0.0),
        ("<think>a</think>so<answer>b</answer>", "", 0.0),
        ("<think>a</think><answer>b</answer>!", "", 0.0),
        ("<answer>b</answer><think>a</think>", "", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_format(response, prompt, reward):
    assert form(response, prompt) == reward
