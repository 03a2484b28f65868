"""Short stories out of a grammar of our own: text to learn from without a download, whose entropy is known exactly.

Every choice that a story makes is between 2, 4, 8, ... equally likely things, so a story is written from a whole number
of random bits, and it can be read back into them: two different strings of bits never give the same text. Hence a
story of b bits has the probability 2^-b, and no model can predict stories better than with b * ln(2) nats on average.
What a model has to learn for that is grammar, eight plots, and to keep names, animals and things to the end.

The bits are those of SHA-256, so the text is the same on every Python, system and year.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from .documents import Document

NUM_STORIES = 16_384

# Each list has 2, 4, 8, ... words. No word begins with a vowel, so that all of them follow "a". A list shares no word
# with another: a model can see from a name alone what it is the name of.
GIRLS = (
    "Anna Bella Clara Daisy Ella Fiona Greta Hanna Iris Julia Kira Lucy Mila Nora Olga Paula Rosa Sara Tilda Ursula "
    "Vera Wanda Yara Zoe Alma Bianca Dora Elsa Flora Heidi Ida Lena"
).split()
BOYS = (
    "Adam Ben Carl David Emil Felix Gustav Henry Ivan Jacob Karl Leo Max Nils Oscar Peter Quentin Robert Simon Tom "
    "Uwe Victor Walter Xaver Anton Bruno Conrad Edgar Franz Hugo Jonas Theo"
).split()
WORDS: dict[str, list[str]] = {
    "elder": [f"Mrs. {name}" for name in "Bell Berry Clay Cook Dove Finch Frost Hazel Lake Moss Pepper Plum Reed Rose Swan Winter".split()]
    + [f"Mr. {name}" for name in "Barley Black Brook Cross Field Flint Green Hill Hunt King Marsh Snow Stone Thorn West Wood".split()],
    "job": (
        "baker banker barber blacksmith butcher captain carpenter clown cobbler cook doctor driver farmer fiddler "
        "fisher gardener grocer guard hatter hunter judge mayor miller nurse painter poet potter sailor shepherd "
        "tailor teacher watchmaker"
    ).split(),
    "trait": (
        "bold brave bright busy calm careful cheerful clever curious dreamy friendly funny gentle honest jolly kind "
        "lively lonely loud modest neat noisy patient polite quick quiet shy strong stubborn tall thoughtful wild"
    ).split(),
    "place": (
        "bakery barn bridge canal castle chapel church farm forest fountain garden gate harbor hill lake library "
        "lighthouse market meadow mill mountain park pond quarry river road school station swamp tower valley village"
    ).split(),
    "animal": (
        "badger bat bear beaver cat cow crow deer dog donkey duck fox frog goat goose hedgehog hen horse lamb lizard "
        "mole mouse pig rabbit raven robin sheep snail squirrel swan turtle wolf"
    ).split(),
    "look": (
        "big black brown dirty fat fluffy furry gray grumpy handsome hungry lame lazy little lost merry muddy nervous "
        "nimble pale pretty sad sleepy slow small soft spotted thin tiny weak white young"
    ).split(),
    "object": (
        "basket bell blanket book bottle button candle clock coin compass crown cup doll drum feather flute hat kite "
        "knife ladder lantern letter map mirror necklace pearl ring rope saddle shell spoon whistle"
    ).split(),
    "color": (
        "beautiful blue broken carved cheap cold copper cracked crooked dusty fine golden green heavy large light "
        "narrow painted pink plain purple red round rusty shiny silver simple square strange striped wooden yellow"
    ).split(),
    "food": "bread butter cake cheese cherries chocolate honey jam milk nuts pancakes pears pie plums raisins soup".split(),
    "wish": [
        "to be a pilot",
        "to build a boat",
        "to cross the desert",
        "to dance on a stage",
        "to fly like a bird",
        "to have a brother",
        "to learn the piano",
        "to live in a tent",
        "to meet the queen",
        "to ride a camel",
        "to see the sea",
        "to sing in a choir",
        "to sleep under the stars",
        "to swim with dolphins",
        "to travel to the moon",
        "to write a novel",
        "to act in a play",
        "to catch a shark",
        "to climb a volcano",
        "to cook for a king",
        "to draw a comic",
        "to find a treasure",
        "to grow a giant pumpkin",
        "to hear a whale",
        "to invent a machine",
        "to keep bees",
        "to own a shop",
        "to play chess",
        "to read every story",
        "to run a marathon",
        "to speak Spanish",
        "to win a medal",
    ],
    "weather": [
        "a cold wind blew",
        "a storm was coming",
        "clouds covered the sky",
        "dew lay on the grass",
        "fog hid the houses",
        "frost covered the windows",
        "hail hit the roofs",
        "it was raining",
        "it was very hot",
        "leaves were falling",
        "snow was falling",
        "the air smelled of spring",
        "the ground was frozen",
        "the sun was shining",
        "there was thunder",
        "warm rain fell",
        "a rainbow appeared",
        "birds were singing",
        "bees were buzzing",
        "flowers were blooming",
        "hardly a leaf moved",
        "ice hung from the roofs",
        "lightning flashed",
        "mist rose from the fields",
        "nobody was outside",
        "puddles were everywhere",
        "stars were still out",
        "the rain had stopped",
        "the snow was melting",
        "the wind was mild",
        "there was a full moon",
        "water ran down the streets",
    ],
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday morning".split(),
    "spot": "barrel bench boulder box bucket bush cart crate fence hedge log rock sack stump table wagon".split(),
    "feeling": (
        "amazed amused content delighted excited glad grateful happy hopeful moved pleased proud relieved satisfied "
        "surprised touched"
    ).split(),
    "cloth": "belt cap cloak coat jacket scarf shirt vest".split(),
    "cloth_color": "checkered dark faded knitted linen long warm woolen".split(),
    "house": "brick country low new snug stone thatched tidy".split(),
    "moral": [
        "A friend is worth more than gold.",
        "Better late than never.",
        "Courage grows with every step.",
        "Even small help is help.",
        "Good news travels fast.",
        "He who waits wins.",
        "It never hurts to ask.",
        "Kind words cost nothing.",
        "Luck comes to those who share.",
        "Many hands make light work.",
        "No day is like another.",
        "Patience opens every door.",
        "Silence can be wise.",
        "The longest night ends.",
        "What is given comes back.",
        "You are never too young to help.",
    ],
}

# A story is three paragraphs: an opening, and two of its plot. A paragraph is a list of sentences; a sentence has
# variants, between bars. {object} is a word of that list, drawn when it first appears and kept from then on;
# {near/behind} is drawn each time.
OPENING = """
There once was a {trait} {child} named {hero}, who lived in a {house} house {near/behind/beside/beyond} the {place}. | In a {house} house {near/behind/beside/beyond} the {place} lived a {trait} {child} named {hero}.
{He} {always/often} wore a {cloth_color} {cloth}.
{His} best friend was a {friend_child} named {friend}. | {He} had a friend, a {friend_child} named {friend}.
{hero} wished {wish}. | More than anything else, {hero} wanted {wish}.
"""

PLOTS = (
    # Something lost
    """
    One {day} {weather}, and {hero} found a {color} {object} {under/behind/beside/near} a {spot}.
    A {look} {animal} {sat/stood/slept/waited} nearby.
    "Whose {object} is this?" asked {hero}. | {hero} showed the {object} to the {animal}.
    "That {object} belongs to {elder}, the {job}," said the {animal}. | The {animal} knew that it belonged to {elder}, the {job}.
    So {hero} called {friend}, and together they {carried/took} the {color} {object} home to {elder}.

    When {elder} saw the {object}, {elder_he} {laughed/wept/smiled/danced}.
    "My {object}!" {elder_he} {cried/called/shouted/whispered}. "Thank you, {hero}, and thank you, {friend}."
    The {job} gave them {food}, and {hero} shared the {food} with the {animal}.
    {He} was {feeling}. | All of them were {feeling}.
    And {his} wish {wish}? It came true a year later. | That night {hero} told the {look} {animal} of {his} wish {wish}.
    """,
    # An animal in need
    """
    One {day} {weather}, and {hero} heard a {noise/cry/sigh/song} from behind a {spot}.
    There {sat/stood/lay/hid} a {look} {animal} that could not {move/walk/sleep/speak}. | It was a {look} {animal} with a {thorn/splinter} in its foot.
    {hero} ran to {elder}, the {job}, who gave {him} a {color} {object}. | {friend} asked {elder}, the {job}, for help, and came back with a {color} {object}.
    With the {object}, {hero} and {friend} {freed/helped/saved/healed} the {animal}.
    {hero} gave it some {food}, and the {animal} ate all of the {food}.

    The {animal} was {feeling}, and so was {hero}.
    In the evening {hero} brought the {object} back to {elder}. | In the evening {friend} brought the {object} back to the {job}.
    "Keep the {object}," said {elder}. "You were {good/kind} to the {animal}."
    Since then the {look} {animal} has lived with {hero} near the {place}. | Since then the {animal} has followed {hero} and {friend} to the {place}.
    There they often talk of {his} wish {wish}. | It knows of {his} wish {wish}, and believes in it.
    """,
    # Lost on the way
    """
    One {day} {weather}, and {hero} and {friend} lost their way {behind/beyond} the {place}.
    They had only some {food} and a {color} {object}. | They carried a {color} {object} and a bag of {food}.
    Under a {spot} they met a {look} {animal}. | A {look} {animal} came out from under a {spot}.
    {hero} gave the {food} to the {animal}, and {friend} showed it the {object}.
    "Follow me," said the {animal}, and it led {hero} and {friend} {down/up} a {narrow/steep} path. | The {animal} took the {object} and walked ahead, and {hero} and {friend} followed it.

    At the end of the path stood {elder}, the {job}. | At last they saw the house of {elder}, the {job}.
    "There you are, {hero}!" {cried/called} {elder}. "I looked for you and {friend} {all day/everywhere}."
    {hero} thanked the {animal} and gave it the {color} {object}.
    {elder} laughed, and the {job} made {tea/soup} for all of them. | {elder} was {feeling}, and the {job} took them home.
    Now {hero} knew that {he} could do anything, and {his} wish {wish} seemed small. | On the way home {hero} told {elder} of {his} wish {wish}.
    """,
    # A theft forgiven
    """
    One {day} {weather}, and {hero} baked {food} for {elder}, the {job}. | One {day} {weather}, and {elder}, the {job}, was ill, so {hero} brought {food}.
    {friend} came along with a {color} {object}. | {He} put it down beside a {color} {object} that {friend} had found.
    Suddenly a {look} {animal} {jumped/crept/flew/ran} out from behind a {spot} and took the {food}.
    "Stop!" {cried/shouted} {hero}, but the {animal} was gone. | {hero} and {friend} ran after the {animal}, but it was too {fast/far}.
    Then {friend} {shook/raised} the {object}, and the {animal} came back.

    The {animal} was {sorry/sad}, for it had {eaten/lost} all of the {food}. | "I was so hungry," said the {animal}, and it gave back the {food}.
    {hero} was not angry with the {look} {animal}. | "You should have asked {hero} or me," said {friend} to the {animal}.
    {elder} {laughed/smiled} when {elder_he} heard of it, and forgave the {animal}. | They went to {elder} together, and the {job} forgave the {animal}.
    {friend} gave {elder} the {color} {object} instead of the {food}.
    The {job} was {feeling}, and asked {hero} about {his} wish {wish}. | Then {elder} asked {hero} about {his} wish {wish}.
    """,
    # A broken present
    """
    One {day} {weather}, and {hero} wanted to give {friend} a {color} {object}. | One {day} {weather}, and {hero} bought a {color} {object} as a present for {friend}.
    But {he} fell over a {spot}, and the {object} broke {in two/to pieces}.
    A {look} {animal} saw it and {came/went} closer. | "Do not cry," said a {look} {animal} that {passed/came} by.
    "{elder} can mend it," said the {animal}. "The {job} can mend everything." | The {animal} brought {hero} to {elder}, the {job}, who could mend {anything/everything}.
    So {hero} and the {animal} {ran/hurried/went/walked} to {elder} with the {object}.

    {elder} {looked at/turned} the {object} for a {long/short} time and then mended it. | The {job} took the {color} {object} and mended it with {glue/string}.
    "You can pay me with {food}," said {elder}, and {hero} gave {elder_him} the {food}. | {hero} had no money, so {he} gave {elder} some {food}.
    When {friend} got the {object}, {friend_he} was {feeling}.
    {hero} thanked the {look} {animal} and {elder}. | "You must thank the {animal}, too," said {hero} to {friend}.
    Later {hero} and {friend} talked of {his} wish {wish}. | {friend} promised to help {him} with {his} wish {wish}.
    """,
    # A trade
    """
    One {day} {weather}, and {hero} had nothing but a {color} {object}. | One {day} {weather}, and {hero} went out to sell a {color} {object}.
    Beside a {spot} {he} met {elder}, the {job}, with a {look} {animal}.
    "Give me the {object} for the {animal}," said {elder}. | "I will give you this {animal} for the {object}," said the {job}.
    {hero} took the {animal} and gave the {object} to {elder}.
    {friend} {laughed/wondered} and said, "What will you do with a {look} {animal}?" | But the {animal} was {clever/strong}, and {friend} liked it at once.

    The next day the {animal} found {food} {behind/near} the {place}. | The next day the {animal} carried {hero} and {friend} to the {place}.
    {hero} {sold/gave} {food/milk} to {elder}, and got the {color} {object} back. | "I miss my {animal}," said {elder}, and gave {hero} the {object} back.
    So {hero} had both the {object} and the {animal}. | Now {friend} had the {animal}, and {hero} the {object}.
    "You are a {good/clever} trader," said {elder} to {hero}. | {friend} was {feeling}, and so was the {job}.
    And soon {his} wish {wish} would come true. | Next {hero} wanted to trade the {object} for {his} wish {wish}.
    """,
    # A contest
    """
    One {day} {weather}, and {elder}, the {job}, held a {contest/race} near the {place}. | One {day} {weather}, and there was a {contest/race} near the {place}, held by {elder}, the {job}.
    The first prize was a {color} {object}, and the second was {food}.
    {hero} came with a {look} {animal}, and {friend} came alone. | {friend} was the first to come, and {hero} came last, with a {look} {animal}.
    At first {friend} was {faster/better} than {hero}. | The {animal} ran ahead of {hero} and {friend}.
    But at the {spot} {friend} fell, and the {animal} stopped to help. | Then {hero} hid behind a {spot}, and only the {animal} found {him}.

    So the {animal} won the {object}, and everybody {cheered/laughed}. | In the end {friend} won the {object}, and {hero} won the {food}.
    {elder} gave the {object} to the winner and the {food} to {hero}. | "Here is the {object}, and here is the {food}," said {elder}.
    {hero} shared the {food} with {friend} and with the {animal}.
    "Next year I will win the {color} {object}," said {hero}. | The {job} was {feeling}, and so was the {look} {animal}.
    On the way home {friend} asked {hero} about {his} wish {wish}. | At night {hero} told the {animal} about {his} wish {wish}.
    """,
    # A secret
    """
    One {day} {weather}, and {elder}, the {job}, told {hero} a secret. | One {day} {weather}, and {hero} got a letter from {elder}, the {job}.
    "A {color} {object} lies under the {spot}, and a {look} {animal} guards it." | It said that a {look} {animal} guarded a {color} {object} under the {spot}.
    {hero} told {friend}, and they went to look for the {object}. | "{friend}, come with me," said {hero}, "and we will find the {object}."
    The {animal} {sat/lay} there and did not move. | The {look} {animal} did not let {hero} come near.
    Then {friend} {gave/threw} it some {food}, and the {animal} ate the {food}.

    {hero} took the {object} and {thanked/stroked} the {animal}. | Then the {animal} itself gave the {object} to {hero}.
    "It is {magic/very old}," said {friend}, but the {object} was only a {object}. | When {friend} touched the {color} {object}, it began to {shine/sing}.
    They brought the {object} to {elder}, who was {feeling}. | "Let the {animal} keep the {object}," said {elder} to {hero}.
    The {animal} came with {hero} and lived with {him} near the {place}. | Since then {hero} and {friend} visit the {animal} every {day}.
    And under the {spot} {hero} buried a note with {his} wish {wish}. | There {hero} told {friend} of {his} wish {wish}.
    """,
)

MENTIONED_AGAIN = ("hero", "friend", "elder", "animal", "object", "food")  # a story must keep these to its end
PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"), "child": ("girl", "boy")}


@dataclass
class Story:
    """A text and what it was written from."""

    text: str = ""
    bits: int = 0  # how many random bits decided it
    combination: str = ""  # hero, animal and object: what is held out together
    mentions: list[tuple[int, int, str]] = field(default_factory=list)  # start, end and kind of what was named before


class RandomBits:
    """The bits of SHA-256 of a story's seed and number, as many as it takes."""

    def __init__(self, seed: int, number: int):
        self.name = f"{seed}:{number}"
        self.value, self.left, self.blocks, self.used = 0, 0, 0, 0

    def choose(self, options):
        """One of 2, 4, 8, ... options."""
        count = len(options).bit_length() - 1
        assert len(options) == 2**count, options
        while self.left < count:
            digest = hashlib.sha256(f"{self.name}:{self.blocks}".encode()).digest()
            self.value = self.value << 256 | int.from_bytes(digest, "big")
            self.left, self.blocks = self.left + 256, self.blocks + 1
        self.left -= count
        self.used += count
        index, self.value = self.value >> self.left, self.value & ((1 << self.left) - 1)
        return options[index]


def write_story(number: int, seed: int = 0) -> Story:
    bits = RandomBits(seed, number)
    story = Story()
    words: dict[str, str] = {}

    def word(name: str) -> str:
        if "/" in name:
            return bits.choose(name.split("/"))
        if name[0].isupper():
            return word(name.lower()).capitalize()
        owner, _, part = name.rpartition("_")
        if part in PRONOUNS:
            word(owner or "hero")
            return PRONOUNS[part][male[owner or "hero"]]
        if name not in words:
            if name == "hero":
                words[name] = bits.choose(GIRLS + BOYS)
                male["hero"] = words[name] in BOYS
                male["friend"] = not male["hero"]
            elif name == "friend":
                words[name] = bits.choose(BOYS if male["friend"] else GIRLS)
            else:
                words[name] = bits.choose(WORDS[name])
                if name == "elder":
                    male["elder"] = words[name].startswith("Mr.")
        return words[name]

    male: dict[str, bool] = {}
    plot = None
    pieces = OPENING.strip().split("\n")
    plot = [line.strip() for line in bits.choose(PLOTS).strip().split("\n")]
    text = ""
    for line in [*pieces, "", *plot, "{moral}"]:
        if not line:
            text += "\n\n"
            continue
        if text and not text.endswith("\n"):
            text += " "
        for literal, name in re.findall(r"([^{}]*)(?:\{([^}]*)\})?", bits.choose(line.split(" | "))):
            text += literal
            if name:
                again = name in words
                value = word(name)
                if again and name in MENTIONED_AGAIN:
                    story.mentions.append((len(text), len(text) + len(value), name))
                text += value
    story.text, story.bits = text, bits.used
    story.combination = f"{words['hero']} {words['animal']} {words['object']}"
    return story


STORIES = "stories"


def story_documents() -> list[Document]:
    return [Document(f"story:{story.combination}", story.text) for story in map(write_story, range(NUM_STORIES))]
