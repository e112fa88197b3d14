"""The instructions of IFEval (Zhou et al. 2023), each a rule of text and the row's kwargs.

Comes in: a response and the arguments, named as the data names them; goes out: whether it follows.
All rules are written here and need no download. Where IFEval asks a language detector, the scripts
and commonest words of a language decide.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable

Rule = Callable[..., bool]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def keep(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return keep


def compare(count: int, wanted: int, relation: str) -> bool:
    """`relation`: "less than" or "at least"."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"an instruction's relation is 'less than' or 'at least', not {relation}")
    return count < wanted if relation == "less than" else count >= wanted


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


_SHORTENED = re.compile(
    r"\b(?:(?i:mr|mrs|ms|dr|st|prof|capt|lt|mt|inc|ltd|jr|sr|vs|e\.g|i\.e)|[A-HJ-Z])\.$"
)


def sentences(text: str) -> list[str]:
    """Parts that end in . ! or ?, closing quotes included; an initial or a title ends none."""
    found: list[str] = []
    parts: list[str] = []
    for piece in re.split(r"(?<=[.!?])(?=[\s\"'”’)]|$)", text):
        closing = re.match(r"[\"'”’)]*", piece)
        if closing and found and not parts:
            found[-1] += closing[0]
            piece = piece[closing.end() :]
        parts.append(piece)
        if not _SHORTENED.search(piece[-8:]):
            found += [whole] if (whole := "".join(parts).strip()) else []
            parts = []
    return [*found, rest] if (rest := "".join(parts).strip()) else found


def ending(sentence: str) -> str:
    """Its last character, quotes aside."""
    return sentence.rstrip("\"'”’) ")[-1:]


def times(word: str, text: str) -> int:
    """How often a word, or a phrase, stands in a text, in whole words of any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def unquoted(text: str) -> str:
    return text.strip().strip('"').strip()


@rule("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


@rule("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(text.lower().count(keyword.lower().strip()), frequency, relation)


@rule("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(times(word, text) for word in forbidden_words)


@rule("keywords:letter_frequency")
def _letter(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(Counter(text.lower())[letter.lower()], let_frequency, let_relation)


@rule("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(text)), num_sentences, relation)


@rule("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(words(text)), num_words, relation)


@rule("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Separated by lines of ***; only the first and the last may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@rule("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Separated by empty lines."""
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = parts[nth_paragraph - 1].split()[0].lstrip("\"'")
    return re.split(r"[.,?!'\"]", first)[0].lower() == first_word.lower()


@rule("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]*\]", text)) >= num_placeholders


@rule("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.lower().strip()
    letters = re.sub(r"[\s.]", "", marker)
    spaced = r"\.?[ ]?".join(map(re.escape, letters)) + (r"\." if marker.endswith(".") else "")
    return re.search(spaced, text.lower()) is not None


@rule("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-)[^\n]*$", text, re.MULTILINE)) == num_bullets


CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@rule("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(choice in text.strip() for choice in CHOICES)


@rule("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    count = sum(bool(part.strip("*").strip()) for part in (*single, *double))
    return count >= num_highlights


@rule("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    marks = re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    return len(marks) >= num_sections


@rule("detectable_format:json_format")
def _json(text: str) -> bool:
    text = text.strip()
    match = re.fullmatch(r"```(?:json|Json|JSON)?(.*)```", text, re.DOTALL)
    try:
        json.loads(match[1] if match else text)
    except (ValueError, RecursionError):
        return False
    return True


@rule("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


@rule("combination:two_responses")
def _two(text: str) -> bool:
    """Two answers, not the same, with ****** between."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    given = [part for part in parts if part]
    return len(given) == 2 and given[0] != given[1]


@rule("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@rule("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return unquoted(text).lower().endswith(end_phrase.strip().lower())


@rule("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@rule("change_case:capital_word_frequency")
def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]+", text))
    return compare(count, capital_frequency, capital_relation)


@rule("change_case:english_capital")
def _upper(text: str) -> bool:
    return text.isupper() and _is_latin(text)


@rule("change_case:english_lowercase")
def _lower(text: str) -> bool:
    return text.islower() and _is_latin(text)


@rule("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


# Ranges of the letters of a script, and for scripts that languages share their commonest words.
SCRIPTS = {
    "devanagari": "\u0900-\u097f", "arabic": "\u0600-\u06ff", "cyrillic": "\u0400-\u04ff",
    "bengali": "\u0980-\u09ff", "gurmukhi": "\u0a00-\u0a7f", "gujarati": "\u0a80-\u0aff",
    "tamil": "\u0b80-\u0bff", "telugu": "\u0c00-\u0c7f", "kannada": "\u0c80-\u0cff",
    "malayalam": "\u0d00-\u0d7f", "thai": "\u0e00-\u0e7f", "hebrew": "\u0590-\u05ff",
    "greek": "\u0370-\u03ff", "hangul": "\uac00-\ud7af", "kana": "\u3040-\u30ff",
    "han": "\u4e00-\u9fff", "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}  # fmt: skip
LANGUAGES = {
    "bn": ("bengali", ""), "pa": ("gurmukhi", ""), "gu": ("gujarati", ""), "ta": ("tamil", ""),
    "te": ("telugu", ""), "kn": ("kannada", ""), "ml": ("malayalam", ""), "th": ("thai", ""),
    "he": ("hebrew", ""), "el": ("greek", ""), "ko": ("hangul", ""), "ja": ("kana", ""),
    "zh": ("han", ""), "zh-cn": ("han", ""),
    "hi": ("devanagari", "है हैं और का की के में से को नहीं यह एक"),
    "mr": ("devanagari", "आहे आहेत आणि च्या ला हे ते मध्ये नाही एक होते या"),
    "ne": ("devanagari", "छ छन् र को मा लाई हो गर्न यो एक पनि भएको"),
    "ar": ("arabic", "في من على أن إلى هذا التي هو لا ما كان هذه"),
    "fa": ("arabic", "و در به از که این است را با برای می آن"),
    "ur": ("arabic", "ہے ہیں اور کا کی کے میں سے کو نہیں یہ ایک"),
    "ru": ("cyrillic", "и в не на что с это как по но они мы"),
    "uk": ("cyrillic", "і в не на що з це як та але ми є"),
    "bg": ("cyrillic", "и в не на че с това как за но са се да е"),
    "en": ("latin", "the of and to in is that it for you with are"),
    "de": ("latin", "der die und das ist nicht ein ich zu mit den sie"),
    "fr": ("latin", "le la les et des est un une que pas vous pour"),
    "es": ("latin", "el los las que es por una con para como más en"),
    "it": ("latin", "il che di è per una sono non con della gli le"),
    "pt": ("latin", "o que não uma os com para é em do da um"),
    "fi": ("latin", "ja on ei se että hän mutta ovat oli myös kun tai"),
    "sw": ("latin", "na ya wa kwa ni za katika la hii yako cha kuwa"),
    "vi": ("latin", "và của là các có không được một cho trong người với"),
}  # fmt: skip


@rule("language:response_language")
def _language(text: str, language: str) -> bool:
    if language not in LANGUAGES:
        raise ValueError(f"an instruction's language {language} is unknown: {', '.join(LANGUAGES)}")
    script, common = LANGUAGES[language]
    letters = {name: _count(text, name) for name in SCRIPTS}
    most = max(letters, key=lambda name: letters[name])
    if not letters[most]:
        return False
    if language == "ja":
        return letters["kana"] > 0 and most in ("kana", "han")
    if language.startswith("zh"):
        return most == "han" and not letters["kana"]
    if most != script:
        return False
    if not common:
        return True
    found = Counter(re.findall(r"[^\s.,!?;:\"'()«»،؟۔।]+", text.lower()))
    scores = {
        name: sum(found[word] for word in other.split())
        for name, (its, other) in LANGUAGES.items()
        if its == script
    }
    return scores[language] > 0 and scores[language] == max(scores.values())


def _count(text: str, script: str) -> int:
    return len(re.findall(f"[{SCRIPTS[script]}]", text))


def _is_latin(text: str) -> bool:
    return 2 * _count(text, "latin") > sum(character.isalpha() for character in text)
