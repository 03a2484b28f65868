"""The grammar of the stories: the same text everywhere, and exactly as many bits as it says.

The proof of the entropy is a reader that knows the templates and nothing of the writer: if it finds one reading of each
story, of as many bits as were drawn, then no two strings of bits give the same text.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from modeling_gpt2repro.data.sources import stories
from modeling_gpt2repro.data.sources.stories import (
    CLOSING,
    MENTIONS,
    OPENING,
    PLOTS,
    WORDS,
    StoryWriter,
    story_documents,
    write_story,
)
from modeling_gpt2repro.data.tokenize import is_validation

TITLE = re.compile(r"A story of (\w+) and (\w+), (Mrs?\. \w+), a (\w+), a (\w+) and some (\w+)\.")
# To be changed with the grammar only, knowingly: runs on the two texts cannot be compared.
TEXTS_SHA256 = "fd7ae4673943435de4eebb485de563d45666f0ab3244d6803eb3b144535383d6"
STORY_7 = """\
A story of Max and Amy, Mr. Stone, a goat, a bottle and some cheese.

Once there was a bright boy of seven named Max. He lived in a stone house beside the harbor. He always wore a dark \
scarf. He liked running and noodles, and his oldest friend was a girl named Amy. More than anything else, Max wanted \
to play the piano.

One Friday in March there was thunder, and Mr. Stone, the cook, told Max a secret. "A young goat guards a rusty \
bottle under a tree." Max told Amy, and they went to look for the bottle. The goat did not let Max pass.

Then Amy gave it some cheese, and the goat ate the cheese. Max took the bottle and stroked the goat. "It is very \
old," said Mr. Stone, and Max gave him the bottle. The goat was proud, and came home with Max. There Max told Amy of \
his wish to play the piano. Kind words cost nothing."""
# What is before each, and the word; worked out from the templates of the opening and of the secret.
MENTIONS_7 = [
    ("n named ", "Max"),
    ("l named ", "Amy"),
    ("g else, ", "Max"),
    ("k, told ", "Max"),
    ("A young ", "goat"),
    ("a rusty ", "bottle"),
    ("ax told ", "Amy"),
    ("for the ", "bottle"),
    ("le. The ", "goat"),
    ("not let ", "Max"),
    (".\n\nThen ", "Amy"),
    ("it some ", "cheese"),
    ("and the ", "goat"),
    ("ate the ", "cheese"),
    ("ook the ", "bottle"),
    ("ked the ", "goat"),
    ('," said ', "Mr. Stone"),
    ("ne, and ", "Max"),
    ("him the ", "bottle"),
    ("le. The ", "goat"),
    ("me with ", "Max"),
    (". There ", "Max"),
    ("ax told ", "Amy"),
]


class Recorder(StoryWriter):
    """Counts what was chosen, by options."""

    def __init__(self, name: str, counts: Counter):
        super().__init__(name)
        self.counts = counts

    def choose(self, options):
        chosen = super().choose(options)
        self.counts[tuple(options), chosen] += 1
        return chosen


def sentences_of(template: str, separator: str) -> list[tuple[str, list[str]]]:
    """What is before each sentence, and its variants."""
    found = []
    for line in map(str.strip, template.strip().splitlines()):
        if not line:
            separator = "\n\n"
        elif line.startswith("| "):
            found[-1][1].append(line[2:])
        else:
            found.append((separator, [line]))
            separator = " "
    return found


def readings(text: str) -> list[float]:
    """The bits of every way in which a text can come from the templates."""
    opening, closing = sentences_of(OPENING, ""), [(" ", [CLOSING])]
    return [
        math.log2(len(PLOTS)) + bits
        for plot in PLOTS
        for bits in read_sentences([*opening, *sentences_of(plot, "\n\n"), *closing], text, {})
    ]


def read_sentences(sentences: list, text: str, words: dict) -> Iterator[float]:
    if not sentences:
        if not text:
            yield 0.0
        return
    (separator, variants), *others = sentences
    for variant in variants:
        for rest, known, bits in read_template(separator + variant, text, words):
            for more in read_sentences(others, rest, known):
                yield math.log2(len(variants)) + bits + more


def read_template(template: str, text: str, words: dict) -> Iterator[tuple[str, dict, float]]:
    """What is left of the text, the words that are known by then, and the bits of the choices."""
    literal, brace, others = template.partition("{")
    if not text.startswith(literal):
        return
    text = text[len(literal) :]
    if not brace:
        yield text, words, 0.0
        return
    name, _, others = others.partition("}")
    options = options_of(name, words)
    for option in options:
        if text.startswith(option):
            known = {**words, name: option} if name in [*WORDS, "hero", "friend"] else words
            for rest, after, bits in read_template(others, text[len(option) :], known):
                yield rest, after, bits + math.log2(len(options))


def options_of(name: str, words: dict) -> list[str]:
    """All that may be written for {name}; one thing if it was named before."""
    if "/" in name:
        return name.split("/")
    if name in words:
        return [words[name]]
    if name == "hero":
        return WORDS["girl"] + WORDS["boy"]
    if name == "friend":
        return WORDS["boy"] if words["hero"] in WORDS["girl"] else WORDS["girl"]
    if name in WORDS:
        return WORDS[name]
    is_girl = words["hero"] in WORDS["girl"]
    is_lady = words.get("elder", "").startswith("Mrs.")
    return {
        "child": ["girl" if is_girl else "boy"],
        "friend_child": ["boy" if is_girl else "girl"],
        "he": ["she" if is_girl else "he"],
        "He": ["She" if is_girl else "He"],
        "his": ["her" if is_girl else "his"],
        "him": ["her" if is_girl else "him"],
        "friend_he": ["he" if is_girl else "she"],
        "elder_he": ["she" if is_lady else "he"],
        "elder_him": ["her" if is_lady else "him"],
    }[name]


def test_the_text_is_the_same_on_every_python_system_and_year():
    documents = story_documents()
    assert len(documents) == stories.NUM_STORIES == len({document.text for document in documents})
    digest = hashlib.sha256("\n".join(document.text for document in documents).encode()).hexdigest()
    assert digest == TEXTS_SHA256
    assert write_story(7).text == STORY_7
    assert write_story(7, seed=1).text != STORY_7


def test_each_story_can_be_read_in_one_way_of_as_many_bits():
    for number in range(200):
        story = write_story(number)
        assert readings(story.text) == [story.bits], story.text
        assert story.bits >= 100


@pytest.mark.parametrize("kind", ["animal", "moral", "girl"])
def test_two_equal_words_would_give_a_story_two_readings(monkeypatch, kind):
    """So the test above can fail: the last word of a list becomes the first one, and that is in some stories."""
    monkeypatch.setitem(WORDS, kind, [*WORDS[kind][:-1], WORDS[kind][0]])
    assert {len(readings(write_story(number).text)) for number in range(100)} == {1, 2}


def test_a_text_with_another_name_or_pronoun_has_no_reading():
    text = write_story(7).text
    assert len(readings(text)) == 1
    hero = TITLE.match(text)[1]
    other = next(name for name in WORDS["girl"] if name not in text)
    assert readings(text[::-1].replace(hero[::-1], other[::-1], 1)[::-1]) == []  # where it was last
    for pronoun, wrong in (("She ", "He "), ("He ", "She "), (" her wish", " his wish"), (" his wish", " her wish")):
        assert pronoun not in text or readings(text.replace(pronoun, wrong, 1)) == []


def test_every_choice_is_among_2_4_8_or_more_different_things_of_even_frequency():
    """Each within 4.5 standard deviations of what even odds give: one in 150,000 is farther away by chance."""
    counts = Counter()
    for number in range(stories.NUM_STORIES):
        Recorder(f"0:{number}", counts).write()
    sites = Counter()
    for (options, _), count in counts.items():
        sites[options] += count
    seen = set().union(*sites)
    assert {word for words in WORDS.values() for word in words} <= seen
    assert set(PLOTS) <= seen
    for options, total in sites.items():
        assert len(options) in (1, 2, 4, 8, 16, 32)
        assert len(set(options)) == len(options)
        share = 1 / len(options)
        for option in options:
            deviation = math.sqrt(total * share * (1 - share))
            assert abs(counts[options, option] - total * share) <= 4.5 * deviation, (option, total)


def test_eight_plots_in_three_paragraphs_below_a_title():
    assert len(PLOTS) == len(set(PLOTS)) >= 8
    for number in range(300):
        story = write_story(number)
        title, opening, first, second = story.text.split("\n\n")
        hero, friend, elder, animal, thing, food = TITLE.fullmatch(title).groups()
        assert story.combination == f"{hero} {animal} {thing}"
        assert opening.count(hero) == 2
        assert opening.count(friend) == 1
        for word in (hero, friend, elder, animal, thing, food):
            assert re.search(rf"\b{word}\b", f"{first} {second}"), word
        assert "  " not in story.text
        assert not re.search(r"\ba [aeiou]|[{}|]", story.text)
        assert all(re.search(r'[.?!]"?$', paragraph) for paragraph in (opening, first, second))


def test_the_pronouns_of_the_hero_agree_throughout():
    """Without the templates: in the opening all of them are the hero's, and so is every wish."""
    for number in range(300):
        title, opening, *plot = write_story(number).text.split("\n\n")
        is_girl = TITLE.fullmatch(title)[1] in WORDS["girl"]
        he, his, child, friend = ("She", "her", "girl", "boy") if is_girl else ("He", "his", "boy", "girl")
        assert re.findall(r"\b(S?[Hh]e)\b", opening) == [he] * 3
        assert re.findall(r"\b(her|his|him)\b", opening) == [his]
        assert re.findall(r"\b(girl|boy)\b", opening) == [child, friend]
        assert re.findall(r"\b(her|his) wish\b", " ".join(plot)) == [his]


def test_mentions_are_where_the_words_of_the_title_are_again():
    kinds = set()
    for number in range(300):
        story = write_story(number)
        again = set()
        for kind, word in zip(MENTIONS, TITLE.match(story.text).groups(), strict=True):
            _first, *others = re.finditer(rf"\b{word}\b", story.text)
            again |= {(place.start(), place.end(), kind) for place in others}
        assert set(story.mentions) <= again
        assert story.mentions == sorted(set(story.mentions))
        kinds_of_story = {kind for _, _, kind in story.mentions}
        assert kinds_of_story >= {"hero", "friend"}  # in the opening; the other kinds only where a plot fixes them
        kinds |= kinds_of_story
    assert kinds == set(MENTIONS)


def test_a_mention_is_counted_where_no_other_sentence_could_go_on():
    """The opening's names are; the sentences of the plot that have a variant are up to where the two differ."""
    story = write_story(7)
    counted = [(story.text[start - 8 : start], story.text[start:stop]) for start, stop, _ in story.mentions]
    assert counted == MENTIONS_7


def test_combinations_of_held_out_stories_are_never_trained_on():
    """By the titles of the whole text, and not by the ids that decide what is held out."""
    combinations = {True: set(), False: set()}
    counts = Counter()
    for document in story_documents():
        is_held_out = is_validation(document.id, 0.05)
        hero, _, _, animal, thing, _ = TITLE.match(document.text).groups()
        combinations[is_held_out].add((hero, animal, thing))
        counts[is_held_out] += 1
    assert 0.04 < counts[True] / counts.total() < 0.06
    assert not combinations[True] & combinations[False]
    # Each part of them is trained on, with others.
    for part in range(3):
        held_out, trained = ({words[part] for words in combinations[split]} for split in (True, False))
        assert held_out <= trained
