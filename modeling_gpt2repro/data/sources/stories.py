"""Short stories out of a grammar of our own: text to learn from without a download, whose entropy is known exactly.

Every choice in a story is between 2, 4, 8, ... equally likely things, so a story is written from a whole number of
random bits; and it can be read back into them, so two strings of bits never give the same text. A story of b bits
therefore has the probability 2^-b, and no model can do better, on average, than b * ln(2) nats.

To come near that, a model has to learn a grammar and eight plots, and to keep names, animals and things to the end. The
title names them: it is a prompt as well, by which a trained model can be asked for a story.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .documents import Document

STORIES = "stories"  # the --dataset_name
NUM_STORIES = 10_000

# 2, 4, 8, ... words or phrases each, none of which begins with a vowel where "a" may come before it.
WORDS = {
    name: words.split(", ")
    for name, words in {
        "girl": "Amy, Bella, Clara, Dora, Emma, Flora, Greta, Hanna, Julia, Lucy, Mila, Nina, Rosa, Sara, Tina, Zoe",
        "boy": "Adam, Ben, Carl, David, Felix, Henry, Jack, Leo, Max, Nils, Oscar, Paul, Robert, Simon, Tom, Victor",
        "elder": "Mrs. Bell, Mrs. Clay, Mrs. Cook, Mrs. Finch, Mrs. Hill, Mrs. Moss, Mrs. Plum, Mrs. Reed, "
        "Mr. Black, Mr. Brook, Mr. Flint, Mr. Green, Mr. King, Mr. Snow, Mr. Stone, Mr. Wood",
        "job": "baker, barber, butcher, captain, carpenter, cook, doctor, driver, farmer, gardener, hunter, judge, "
        "painter, sailor, tailor, teacher",
        "animal": "bear, cat, cow, deer, dog, duck, fox, frog, goat, goose, horse, mouse, pig, rabbit, swan, wolf",
        "look": "big, brown, fat, gray, hungry, lame, lazy, little, lost, pretty, sleepy, small, thin, tiny, white, "
        "young",
        "object": "bell, book, bottle, candle, coin, crown, cup, doll, drum, flute, hat, kite, map, pearl, ring, shell",
        "color": "blue, broken, cheap, dusty, golden, heavy, large, painted, pink, purple, red, round, rusty, shiny, "
        "silver, yellow",
        "food": "bread, butter, cake, cheese, cherries, honey, jam, milk, nuts, pancakes, pears, pie, plums, raisins, "
        "salad, soup",
        "trait": "bold, brave, bright, calm, careful, cheerful, clever, curious, gentle, kind, lively, polite, quiet, "
        "shy, tall, wild",
        "house": "brick, clean, country, crooked, cozy, low, modern, narrow, new, quiet, simple, snug, stone, tidy, "
        "warm, wooden",
        "place": "bridge, castle, church, farm, forest, garden, harbor, lake, market, mill, park, river, school, "
        "station, tower, village",
        "fabric": "checkered, dark, faded, knitted, linen, long, warm, woolen",
        "cloth": "belt, cap, cloak, coat, jacket, scarf, shirt, vest",
        "hobby": "chess, cooking, dancing, drawing, fishing, football, games, music, painting, puzzles, reading, "
        "riddles, running, singing, swimming, walking",
        "dish": "berries, biscuits, carrots, chocolate, cocoa, corn, fish, grapes, ham, melons, noodles, peas, "
        "potatoes, rice, tea, toast",
        "wish": "to be a pilot, to build a boat, to dance on a stage, to fly like a bird, to have a brother, "
        "to learn to swim, to live in a tent, to meet the queen, to play the piano, to ride a camel, to see the sea, "
        "to sing in a choir, to sleep under the stars, to travel to the moon, to win a race, to write a story",
        "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, morning",
        "month": "January, February, March, April, May, June, July, August",
        "weather": "a cold wind blew, a storm was coming, birds were singing, clouds covered the sky, "
        "fog hid the houses, frost covered the roofs, it was raining, it was very hot, leaves were falling, "
        "snow was falling, the sky was clear, the snow was melting, the sun was shining, the wind was mild, "
        "there was a full moon, there was thunder",
        "spot": "barrel, bench, bucket, bush, cart, fence, hedge, log, rock, sack, stump, table, tree, wagon, wall, "
        "well",
        "feeling": "amused, content, delighted, excited, glad, grateful, happy, hopeful, moved, pleased, proud, "
        "relieved, satisfied, surprised, thankful, touched",
        "moral": "A friend is worth more than gold., Better late than never., Courage grows with every step., "
        "Even small help is help., Good news travels fast., He who waits wins., It never hurts to ask., "
        "Kind words cost nothing., Luck comes to those who share., Many hands make light work., "
        "No day is like another., Patience opens every door., Silence can be wise., The longest night ends., "
        "What is given comes back., You are never too young to help.",
    }.items()
}
# By gender, female first. The friend of a girl is a boy, and the other way round.
PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"), "child": ("girl", "boy")}

# A line is a sentence, and a line that begins with a bar is a variant of the one above. {animal} is a word of that
# list, drawn where it comes first and the same from there on; {near/behind} is drawn each time; {friend_he} is the
# friend's pronoun, and {he} the hero's.
OPENING = """
    A story of {hero} and {friend}, {elder}, a {animal}, a {object} and some {food}.

    {There once/Once there} was a {trait} {child} of {six/seven/eight/nine} named {hero}.
    {He} lived in a {house} house {near/behind/beside/beyond} the {place}.
    {He} {always/often} wore a {fabric} {cloth}.
    {He} liked {hobby} and {dish}, and {his} {best/oldest} friend was a {friend_child} named {friend}.
    More than {anything/all} else, {hero} wanted {wish}.
"""

PLOTS = (
    # Something lost
    """
    One {day} in {month} {weather}, and {hero} found a {color} {object} {under/behind/beside/near} a {spot}.
    A {look} {animal} {sat/stood/slept/waited} nearby.
    "Whose {object} is this?" asked {hero}.
    | {hero} showed the {object} to the {animal}.
    "It belongs to {elder}, the {job}," said the {animal}.
    | The {animal} knew that it belonged to {elder}, the {job}.

    So {hero} and {friend} {carried/took/brought/returned} the {object} to {elder}.
    "My {object}!" {elder_he} {cried/called/shouted/whispered}. "Thank you, {hero}!"
    The {job} gave them {food}, and {friend} shared the {food} with the {animal}.
    All of them were {feeling}.
    That night {hero} told the {animal} of {his} wish {wish}.
    | And {his} wish {wish}? It came true a year later.
    """,
    # An animal in need
    """
    One {day} in {month} {weather}, and {hero} heard a {noise/cry/sigh/song} from behind a {spot}.
    There {sat/stood/lay/hid} a {look} {animal} with a {thorn/splinter} in its foot.
    {friend} ran to {elder}, the {job}, who sent a {color} {object}.
    | {elder}, the {job}, came to help, and brought a {color} {object}.
    With the {object}, {hero} and {friend} {freed/helped/saved/healed} the {animal}.

    Then {hero} gave the {animal} some {food}, and it ate all of the {food}.
    "Keep the {object}," said {elder} to {hero}.
    | {elder} gave the {object} to {friend}.
    The {animal} was {feeling}, and so was the {job}.
    Since then the {animal} has lived with {hero} near the {place}.
    | Since then the {animal} has followed {hero} and {friend}.
    It knows of {his} wish {wish}, and believes in it.
    | They often talk of {his} wish {wish}.
    """,
    # Lost on the way
    """
    One {day} in {month} {weather}, and {hero} and {friend} lost their way {behind/beyond} the {place}.
    They had only some {food} and a {color} {object}.
    | They carried a {color} {object} and a bag of {food}.
    Under a {spot} they met a {look} {animal}.
    | A {look} {animal} came out from under a {spot}.
    {hero} gave the {food} to the {animal}, and {friend} showed it the {object}.

    "Follow me," said the {animal}, and {hero} followed.
    | The {animal} took the {object} and walked ahead.
    At last they came to the house of {elder}, the {job}.
    | At the end of the path stood {elder}, the {job}.
    "There you are, {hero}!" {cried/called} {elder}. "I looked {all day/everywhere}."
    {hero} thanked the {animal} and gave it the {object}.
    | {elder} was {feeling}, and thanked the {animal}.
    On the way home {hero} told {friend} of {his} wish {wish}.
    | Now {hero} was not afraid, and {his} wish {wish} seemed small.
    """,
    # A theft forgiven
    """
    One {day} in {month} {weather}, and {hero} brought {food} to {elder}, the {job}.
    {friend} came along with a {color} {object}.
    | {He} put it down beside a {color} {object}.
    Suddenly a {look} {animal} {jumped/crept/flew/ran} out from behind a {spot} and took the {food}.
    "Stop!" {cried/shouted} {hero}, but the {animal} was gone.
    | {hero} ran after the {animal}, but it was too {fast/far}.

    Then {friend} {shook/raised} the {object}, and the {animal} came back.
    "I was so hungry," said the {animal}.
    | The {animal} was {sorry/sad}, and gave back the {food}.
    {elder} {laughed/smiled}, and {hero} forgave the {animal}.
    | "You should have asked {hero}," said {elder} to the {animal}.
    {friend} gave the {object} to {elder}, who was {feeling}.
    Then the {job} asked {hero} about {his} wish {wish}.
    | At night {hero} told {friend} of {his} wish {wish}.
    """,
    # A broken present
    """
    One {day} in {month} {weather}, and {hero} wanted to give {friend} a {color} {object}.
    But {he} fell over a {spot}, and the {object} broke {in two/to pieces}.
    "Do not cry," said a {look} {animal} that {passed/came} by.
    | A {look} {animal} saw it and {came/went} closer.
    The {animal} knew {elder}, the {job}, who could mend {anything/everything}.

    So {hero} and the {animal} {ran/hurried/went/walked} to {elder} with the {object}.
    {elder} mended it, and {hero} gave {elder_him} some {food}.
    | "It costs some {food}," said {elder}, and {hero} went to get the {food}.
    When {friend} got the {object}, {friend_he} was {feeling}.
    {hero} thanked the {animal} and the {job}.
    | "You must thank the {animal}, too," said {hero}.
    Later {hero} and {friend} talked of {his} wish {wish}.
    | {friend} promised to help {him} with {his} wish {wish}.
    """,
    # A trade
    """
    One {day} in {month} {weather}, and {hero} had nothing but a {color} {object}.
    Beside a {spot} {he} met {elder}, the {job}, with a {look} {animal}.
    "Give me the {object} for the {animal}," said {elder}.
    | {elder} wanted the {object}, and offered {him} the {animal}.
    {hero} took the {animal}, and {friend} {laughed/wondered/smiled/clapped}.

    The next day the {animal} found {food} {behind/near} the {place}.
    | The next day the {animal} carried {hero} to the {place}, where {he} found {food}.
    {hero} gave the {food} to {elder}, and got the {object} back.
    | "I miss my {animal}," said {elder}, and gave the {object} back.
    Now {friend} had the {animal}, and {hero} the {object}.
    "You are a {good/clever} trader," said the {job} to {hero}.
    | {friend} was {feeling}, and so was the {job}.
    Next {hero} wanted to trade the {object} for {his} wish {wish}.
    | And soon {his} wish {wish} came true.
    """,
    # A contest
    """
    One {day} in {month} {weather}, and {elder}, the {job}, held a {contest/race} near the {place}.
    The first prize was a {color} {object}, and the second was {food}.
    {hero} came with a {look} {animal}, and {friend} came alone.
    | {friend} came first, and {hero} came with a {look} {animal}.
    At first {friend} was {faster/better} than {hero}.
    | The {animal} ran ahead of {hero} and {friend}.

    But behind a {spot} {friend} fell, and the {animal} {stopped/stayed} to help.
    So {hero} won the {object}, and {friend} won the {food}.
    | In the end {friend} won the {object}, and {hero} won the {food}.
    "Here is the {object}," said {elder} {loudly/kindly/slowly/proudly}.
    {hero} was {feeling}, and so was the {animal}.
    | {hero} shared the {food} with the {animal}.
    On the way home {friend} asked {hero} about {his} wish {wish}.
    | At night {hero} told the {animal} about {his} wish {wish}.
    """,
    # A secret
    """
    One {day} in {month} {weather}, and {elder}, the {job}, told {hero} a secret.
    "A {look} {animal} guards a {color} {object} under a {spot}."
    {hero} told {friend}, and they went to look for the {object}.
    | "Come, {friend}," said {hero}, "and we will find the {object}."
    The {animal} {sat/lay} there and did not {move/speak}.
    | The {animal} did not let {hero} {pass/come near}.

    Then {friend} {gave/threw} it some {food}, and the {animal} ate the {food}.
    {hero} took the {object} and {thanked/stroked} the {animal}.
    | The {animal} itself gave the {object} to {hero}.
    "It is {magic/very old}," said {elder}, and {hero} gave {elder_him} the {object}.
    | When {friend} touched the {object}, it began to {shine/sing}.
    The {animal} was {feeling}, and came home with {hero}.
    | Since then {hero} visits the {animal} every {day}.
    And {his} wish {wish}? It was a secret, too.
    | There {hero} told {friend} of {his} wish {wish}.
    """,
)
CLOSING = "{moral}"

MENTIONS = ("hero", "friend", "elder", "animal", "object", "food")  # what a story must not mix up


@dataclass
class Story:
    """A text, and what it was written from."""

    text: str = ""
    bits: int = 0  # how many random bits decided it: its probability is 2^-bits
    combination: str = ""  # hero, animal and object
    # Where the text mentions again what it has named before, and nothing else could stand there: first character, one
    # after the last, and a MENTIONS.
    mentions: list[tuple[int, int, str]] = field(default_factory=list)


def write_story(number: int, seed: int = 0) -> Story:
    """The story of this number: the same on every Python, system and year."""
    return StoryWriter(f"{seed}:{number}").write()


@lru_cache(maxsize=NUM_STORIES)  # they are read again and again: for a tokenizer, for tokens, for scores
def built_in_story(number: int) -> Story:
    """The story of this number in the text `stories`, which has NUM_STORIES; not to be changed."""
    return write_story(number)


def story_documents() -> list[Document]:
    """NUM_STORIES stories. The id is the combination, so that those held out have combinations never trained on."""
    stories = map(built_in_story, range(NUM_STORIES))
    return [Document(f"story:{story.combination}", story.text) for story in stories]


class StoryWriter:
    """Writes one story from the bits of SHA-256 of its name."""

    def __init__(self, name: str):
        self.name = name
        self.random = ""  # drawn and not yet used: "0110..."
        self.blocks = 0
        self.words: dict[str, str] = {}  # of this story
        self.story = Story()

    def write(self) -> Story:
        plot = self.choose(PLOTS)
        for paragraph in [*paragraphs(OPENING), *paragraphs(plot)]:
            self.story.text += "\n\n" if self.story.text else ""
            for number, variants in enumerate(paragraph):
                self.story.text += " " if number else ""
                sentence = self.choose(variants)
                self.write_sentence(sentence, FIRST_OF_PLOTS if sentence in FIRST_OF_PLOTS else variants)
        self.write_sentence(f" {CLOSING}", [])
        self.story.combination = " ".join(self.words[kind] for kind in ("hero", "animal", "object"))
        return self.story

    def choose(self, options: Sequence[str]) -> str:
        """One of 2^k options, by the next k bits."""
        bits = len(options).bit_length() - 1
        while len(self.random) < bits:
            digest = hashlib.sha256(f"{self.name}:{self.blocks}".encode()).digest()
            self.random += f"{int.from_bytes(digest, 'big'):0256b}"
            self.blocks += 1
        drawn, self.random = self.random[:bits], self.random[bits:]
        self.story.bits += bits
        return options[int(drawn or "0", 2)]

    def write_sentence(self, template: str, alternatives: Sequence[str]):
        """Append the sentence; `alternatives` are the sentences that could stand in its place."""
        for part in re.finditer(r"[^{}]+|{([^}]+)}", template):
            name = part[1]
            is_again = name in self.words
            text = self.fill(name) if name else part[0]
            if is_again and name in MENTIONS:
                # Who has read this far does not know which of those that begin alike it is.
                alike = [other for other in alternatives if other.startswith(template[: part.start()])]
                if all(other.startswith(template[: part.end()]) for other in alike):
                    start = len(self.story.text)
                    self.story.mentions.append((start, start + len(text), name))
            self.story.text += text

    def fill(self, name: str) -> str:
        """The words for {name}."""
        if "/" in name:
            return self.choose(name.split("/"))
        if name[0].isupper():
            return self.fill(name.lower()).capitalize()
        person, _, pronoun = name.rpartition("_")
        if pronoun in PRONOUNS:
            return PRONOUNS[pronoun][self.is_male(person or "hero")]
        if name not in self.words:
            self.words[name] = self.choose(self.options(name))
        return self.words[name]

    def options(self, name: str) -> Sequence[str]:
        if name == "hero":
            return WORDS["girl"] + WORDS["boy"]
        if name == "friend":
            return WORDS["girl" if self.is_male("hero") else "boy"]
        return WORDS[name]

    def is_male(self, person: str) -> bool:
        name = self.words[person]
        return name in WORDS["boy"] or name.startswith("Mr. ")


def paragraphs(template: str) -> list[list[list[str]]]:
    """The paragraphs of a template, their sentences, and the variants of each."""
    return [
        [sentence.split("\n| ") for sentence in re.split(r"\n(?!\|)", re.sub(r"\n +", "\n", paragraph.strip()))]
        for paragraph in template.split("\n\n")
    ]


FIRST_OF_PLOTS = [paragraphs(plot)[0][0][0] for plot in PLOTS]
