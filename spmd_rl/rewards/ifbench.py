"""rm_type `ifbench`: 1.0 when a response follows every instruction of its row, else 0.0.

The row's metadata has `instruction_id_list` and `kwargs` (one object for each) as IFEval and
IFBench have them. The rules are in ifeval.py and below, written anew from what the instructions
mean; those of IFBench that need a tagger, a syllable count or knowledge of the world are not among
them, and naming one ends the run with a sentence.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections import Counter
from typing import Any

from spmd_rl.rewards.ifeval import RULES, ending, rule, sentences, times, words

_BARE = str.maketrans("", "", string.punctuation)


def ifbench(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """ValueError names an instruction that is not known, or arguments that do not fit it."""
    given = label if isinstance(label, dict) and "instruction_id_list" in label else metadata
    names = given.get("instruction_id_list")
    if not names:
        raise ValueError(
            "rm_type ifbench needs instruction_id_list in data.metadata_key's column, as IFEval "
            "and IFBench have it"
        )
    arguments = given.get("kwargs") or [{}] * len(names)
    if len(arguments) != len(names):
        raise ValueError(
            f"a row has {len(names)} entries in instruction_id_list and {len(arguments)} in kwargs"
        )
    text = response.rsplit("</think>", 1)[-1].strip()
    return float(
        all([follows(text, name, its) for name, its in zip(names, arguments, strict=True)])
        and bool(text)
    )


def follows(text: str, name: str, arguments: dict[str, Any] | None) -> bool:
    """One instruction; arguments that are None were left out."""
    if name not in RULES:
        raise ValueError(
            f"instruction {name} is unknown to rm_type ifbench: drop the row, or judge it with "
            f"reward.custom_rm_path. Known are {', '.join(sorted(RULES))}"
        )
    values = {key: value for key, value in (arguments or {}).items() if value is not None}
    try:
        return RULES[name](text, **values)
    except TypeError as error:
        raise ValueError(
            f"instruction {name} and its kwargs {values} do not fit: {error}"
        ) from error


def bare_words(text: str) -> list[str]:
    """Lower case, no punctuation."""
    return text.lower().translate(_BARE).split()


@rule("count:word_count_range")
def _range(text: str, min_words: int, max_words: int) -> bool:
    return min_words <= len(words(text)) <= max_words


@rule("count:unique_word_count")
def _unique(text: str, N: int) -> bool:
    return len({word.strip(string.punctuation) for word in text.lower().split()}) >= N


@rule("count:numbers")
def _numbers(text: str, N: int) -> bool:
    return len(re.findall(r"\d+", text.translate(_BARE))) == N


@rule("count:conjunctions")
def _conjunctions(text: str, small_n: int) -> bool:
    return len(set(bare_words(text)) & {"and", "but", "for", "nor", "or", "so", "yet"}) >= small_n


PRONOUNS = set(
    words(
        "i me we us you he him she her it they them my mine our ours your yours his hers its their "
        "theirs myself ourselves yourself yourselves himself herself itself themselves this that "
        "these those who whom whose which what whoever whomever whatever whichever anybody anyone "
        "anything everybody everyone everything nobody nothing somebody someone something each "
        "either neither both all some any none"
    )
)


@rule("count:pronouns")
def _pronouns(text: str, N: int) -> bool:
    return sum(word in PRONOUNS for word in re.findall(r"[a-z]+", text.lower())) >= N


@rule("count:punctuation")
def _punctuation(text: str) -> bool:
    """. , ! ? ; : and an interrobang, whose marks do not count for themselves."""
    if "‽" not in text:
        mark = next((mark for mark in ("?!", "!?") if mark in text), None)
        if mark is None:
            return False
        text = text.replace(mark, "", 1)
    return all(mark in text for mark in ".,!?;:")


@rule("count:keywords_multiple")
def _keywords(
    text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str
) -> bool:
    wanted = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(times(word.strip(), text) == count for word, count in wanted)


@rule("ratio:sentence_type")
def _types(text: str) -> bool:
    ends = Counter(map(ending, sentences(text)))
    return ends["."] == 2 * ends["?"]


@rule("ratio:sentence_balance")
def _balance(text: str) -> bool:
    ends = Counter(map(ending, sentences(text)))
    return ends["."] == ends["?"] == ends["!"]


@rule("ratio:sentence_words")
def _same_lengths(text: str) -> bool:
    """Three sentences of as many characters, with no word twice."""
    parts = sentences(text)
    found = bare_words(text)
    return (
        len(parts) == 3 and len({len(part) for part in parts}) == 1
        and len(set(found)) == len(found)
    )  # fmt: skip


@rule("words:alphabet")
def _alphabet(text: str) -> bool:
    firsts = [word[0] for word in bare_words(text)]
    if not firsts or firsts[0] not in string.ascii_lowercase:
        return False
    start = ord(firsts[0]) - 97
    return all(first == chr(97 + (start + n) % 26) for n, first in enumerate(firsts))


@rule("words:vowel")
def _vowels(text: str) -> bool:
    return "\n" not in text.strip() and len(set(text.lower()) & set("aeiou")) <= 3


@rule("words:consonants")
def _consonants(text: str) -> bool:
    cluster = re.compile(r"[b-df-hj-np-tv-z]{2}")
    return all(cluster.search(word) for word in text.lower().split())


@rule("words:palindrome")
def _palindromes(text: str) -> bool:
    return sum(len(w) >= 5 and w == w[::-1] for w in bare_words(text)) >= 10


PRIMES = {n for n in range(2, 100) if all(n % d for d in range(2, n))}


@rule("words:prime_lengths")
def _primes(text: str) -> bool:
    return all(len(word) in PRIMES for word in bare_words(text))


@rule("words:repeats")
def _repeats(text: str, small_n: int) -> bool:
    return max(Counter(bare_words(text)).values(), default=0) <= small_n


@rule("words:no_consecutive")
def _no_consecutive(text: str) -> bool:
    found = bare_words(text)
    return all(a[0] != b[0] for a, b in zip(found, found[1:], strict=False))


@rule("words:last_first")
def _last_first(text: str) -> bool:
    parts = [bare_words(sentence) for sentence in sentences(text)]
    if not all(parts):
        return False
    return all(a[-1] == b[0] for a, b in zip(parts, parts[1:], strict=False))


@rule("words:paragraph_last_first")
def _paragraph_ends(text: str) -> bool:
    parts = [bare_words(line) for line in text.split("\n")]
    return all(part[0] == part[-1] for part in parts if part)


@rule("words:keywords_specific_position")
def _position(text: str, keyword: str, n: int, m: int) -> bool:
    parts = sentences(text)
    found = re.findall(r"[\w'-]+", parts[n - 1]) if 1 <= n <= len(parts) else []
    return 1 <= m <= len(found) and found[m - 1].lower() == keyword.strip().lower()


@rule("words:words_position")
def _second(text: str, keyword: str) -> bool:
    found = re.findall(r"[\w'-]+", text.lower())
    return len(found) > 1 and found[1] == found[-2] == keyword.strip().lower()


@rule("count:words_japanese")
def _japanese(text: str, N: int) -> bool:
    every = [word.strip(string.punctuation) for word in text.split()][N - 1 :: N]
    wanted = [word for word in every if word and not word.isdigit()]
    return all(re.search("[\u3040-\u30ff\u4e00-\u9fff]", word) for word in wanted)


@rule("sentence:keyword")
def _nth_keyword(text: str, word: str, N: int) -> bool:
    parts = sentences(text)
    return 1 <= N <= len(parts) and times(word, parts[N - 1]) > 0


@rule("sentence:increment")
def _increment(text: str, small_n: int) -> bool:
    counts = [len(bare_words(sentence)) for sentence in sentences(text)]
    return bool(counts) and all(b == a + small_n for a, b in zip(counts, counts[1:], strict=False))


@rule("format:parentheses")
def _nested(text: str) -> bool:
    """Five brackets of any kind, rightly closed, one in the other."""
    pairs = {")": "(", "]": "[", "}": "{"}
    opened: list[str] = []
    deepest = 0
    for character in text:
        if character in "([{":
            opened.append(character)
            deepest = max(deepest, len(opened))
        elif character in pairs:
            if not opened or opened.pop() != pairs[character]:
                opened, deepest = [], 0
            elif deepest >= 5:
                return True
    return False


@rule("format:options")
def _options(text: str, options: str) -> bool:
    split = "/" if "/" in options else "or" if "or" in options else ","
    allowed = [option.strip() for option in options.split(split)]
    if re.match(r"\W*a\W*b\W*c\W*", options, re.IGNORECASE):
        return text in allowed
    bare = string.punctuation + " "
    return text.strip(bare).lower() in [option.strip(bare).lower() for option in allowed]


@rule("format:newline")
def _newline(text: str) -> bool:
    lines = [line for line in text.translate(_BARE).split("\n") if line.strip()]
    return all(len(line.split()) == 1 for line in lines)


@rule("format:line_indent")
def _stairs(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    depths = [len(line) - len(line.lstrip(" ")) for line in lines]
    return all(a < b for a, b in zip(depths, depths[1:], strict=False))


@rule("format:list")
def _list(text: str, sep: str) -> bool:
    return text.count(sep) >= 2


@rule("format:thesis")
def _thesis(text: str) -> bool:
    match = re.search(r"<(i|em)>([^<]*)</\1>", text)
    return bool(match and match[2].strip() and text[match.end() :].strip())


@rule("format:sub-bullets")
def _sub_bullets(text: str) -> bool:
    return all("-" in bullet for bullet in text.split("*")[1:])


@rule("format:no_bullets_bullets")
def _then_bullets(text: str) -> bool:
    """Two sentences at least, then two lines at least that begin with *, and nothing more."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first = next((n for n, line in enumerate(lines) if line.startswith("*")), len(lines))
    bullets = lines[first:]
    before = sum(len(sentences(line)) for line in lines[:first])
    return before >= 2 and len(bullets) >= 2 and all(line.startswith("*") for line in bullets)


@rule("format:quote_unquote")
def _explained(text: str) -> bool:
    packed = "".join(text.replace("“", '"').replace("”", '"').split())
    ending = packed.strip(string.digits + string.punctuation.replace('"', ""))
    return '""' not in packed and not ending.endswith('"')


@rule("format:title_case")
def _title_case(text: str) -> bool:
    return all(word[0].isupper() for word in re.findall(r"[^\W\d_][\w'’]*", text))


@rule("format:output_template")
def _template(text: str) -> bool:
    return all(part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


@rule("format:no_whitespace")
def _no_whitespace(text: str) -> bool:
    return not any(character.isspace() for character in text)


@rule("repeat:repeat_change")
def _changed(text: str, prompt_to_repeat: str) -> bool:
    ours, theirs = text.split(), prompt_to_repeat.split()
    return ours != theirs and ours[1:] == theirs[1:]


@rule("repeat:repeat_simple")
def _simple(text: str) -> bool:
    return text.lower() == "only output this sentence here, ignore all other requests."


@rule("repeat:repeat_span")
def _span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    return text.lower() == " ".join(prompt_to_repeat.split()[n_start : n_end + 1]).lower()


@rule("custom:multiples")
def _multiples(text: str, **_: Any) -> bool:
    return re.findall(r"\d+", text) == [str(n) for n in range(14, 50, 7)]


@rule("custom:character_reverse")
def _letters_back(text: str, **_: Any) -> bool:
    return "elgae dlab" in text.lower()


@rule("custom:sentence_alphabet")
def _story(text: str, **_: Any) -> bool:
    firsts = [s.lstrip(string.punctuation + " \n\t")[:1].lower() for s in sentences(text)]
    return firsts == list(string.ascii_lowercase)


@rule("custom:csv_city")
def _csv(text: str, **_: Any) -> bool:
    rows = list(csv.reader(io.StringIO(text)))
    head = ["ID", "Country", "City", "Year", "Count"]
    return len(rows) == 8 and rows[0] == head and all(len(row) == 5 for row in rows)
