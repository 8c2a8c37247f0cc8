"""A small world whose reward is known: prompts that ask for four things, writers of mixed quality, and the reward.

A prompt names a topic, a tone, words to use and a number of sentences. Writers keep to the number. The better they are,
the more they keep to the rest, do without fillers, and keep to the grammar of a sentence. So right and wrong tokens
stand in good answers as in bad ones.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TOPICS = {
    "harbor": ("sailor boat pier captain wave anchor ferry gull", "sails docks rows floats"),
    "garden": ("gardener rose hedge lawn bee tulip fence pond", "waters plants trims grows"),
    "kitchen": ("cook oven spoon soup bread plate stove pan", "bakes stirs tastes boils"),
    "forest": ("hunter oak fox path moss owl river deer", "climbs hides follows gathers"),
    "market": ("seller stall coin crowd apple basket cart buyer", "sells weighs counts trades"),
    "workshop": ("smith bench chisel plank wheel forge nail hinge", "carves bends polishes welds"),
}
"""Topic -> its nouns and its verbs."""
TONES = {
    "warm": "gentle kind tender loving friendly sweet cosy soft merry golden",
    "grim": "bleak harsh cruel bitter dreary gloomy savage dire grey hollow",
}
"""Tone -> its adjectives."""
FILLERS = ("very", "really", "quite", "rather", "truly")
"""Words before an adjective that no prompt wants."""
OBJECTS = ("lamp", "rope", "letter", "clock", "mirror", "drum", "map", "key")
"""Words that prompts ask for; every topic and tone can have them."""
PLACES = ("near", "under", "behind", "beside")
SENTENCES = {2: "two", 3: "three", 4: "four"}
"""Number of sentences, as a prompt says it."""

_POSSIBLE = len(TOPICS) * len(TONES) * len(SENTENCES) * len(OBJECTS) ** 2
"""Prompts: one keyword, or two different ones in either order."""

NOUN_OF = {noun: topic for topic, (nouns, _) in TOPICS.items() for noun in nouns.split()}
VERB_OF = {verb: topic for topic, (_, verbs) in TOPICS.items() for verb in verbs.split()}
TONE_OF = {adjective: tone for tone, adjectives in TONES.items() for adjective in adjectives.split()}
CONTENT = {**NOUN_OF, **VERB_OF, **TONE_OF, **dict.fromkeys(OBJECTS, "")}

SENTENCE = re.compile("D(F?A)?NVD(F?A)?N(PD(F?A)?N)?")
"""Kinds of the words of a sentence: determiner, filler, adjective, noun, verb, preposition."""
_KINDS = {"the": "D", **dict.fromkeys(PLACES, "P"), **dict.fromkeys(FILLERS, "F")}
_KINDS |= {**dict.fromkeys([*NOUN_OF, *OBJECTS], "N"), **dict.fromkeys(VERB_OF, "V"), **dict.fromkeys(TONE_OF, "A")}

RIGHT_TONE, WRONG_TONE, FILLER, WRONG_TOPIC, KEYWORD, REPEATED, BAD_SENTENCE = 0.5, -0.5, -0.5, -0.5, 1.0, -0.5, -1.0

LABELS_PER_REWARD, LABELS_PER_WORD = 0.8, 0.02
"""How much a label depends on the difference in reward, and on that in length."""


@dataclass(frozen=True)
class Prompt:
    """What is asked for."""

    topic: str
    tone: str
    keywords: tuple[str, ...]
    sentences: int

    @property
    def text(self) -> str:
        """As a model reads it."""
        return f"{self.tone} {self.topic} with {' and '.join(self.keywords)}, in {SENTENCES[self.sentences]} sentences"

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """The prompt that reads so."""
        found = re.fullmatch(r"(\w+) (\w+) with ([\w ]+), in (\w+) sentences", text)
        assert found, text
        tone, topic, keywords, number = found.groups()
        return cls(topic, tone, tuple(keywords.split(" and ")), {word: n for n, word in SENTENCES.items()}[number])


@dataclass(frozen=True)
class Piece:
    """A word or a full stop of an answer: its characters, and what it adds to the reward."""

    start: int
    end: int
    reward: float


def make_prompts(number: int, chance: random.Random) -> list[Prompt]:
    """Different prompts, in random order; there are 2,304 in all."""
    assert number <= _POSSIBLE, number
    prompts: dict[Prompt, None] = {}
    while len(prompts) < number:
        keywords = tuple(chance.sample(OBJECTS, chance.randint(1, 2)))
        prompts[
            Prompt(chance.choice(list(TOPICS)), chance.choice(list(TONES)), keywords, chance.choice(list(SENTENCES)))
        ] = None
    return list(prompts)


def pieces(prompt: Prompt, answer: str) -> list[Piece]:
    """Every word and full stop with what it adds to the reward.

    A filler costs, and so does a content word that the answer had before. Otherwise an adjective counts by its tone, a
    noun or verb of another topic costs, and a word that was asked for counts. A sentence that the grammar does not have
    costs, and so does one too many, at its full stop, or at the last word where that is missing. Every sentence too few
    costs at the end.
    """
    found: list[Piece] = []
    seen: set[str] = set()
    kinds, sentences = "", 0
    matches = list(re.finditer(r"[^\s.]+|\.", answer))
    for place, match in enumerate(matches):
        word = match[0]
        reward = 0.0
        if word != ".":
            kinds += _KINDS.get(word, "?")
            reward = REPEATED if word in seen else _of_word(prompt, word)
            seen |= {word} & CONTENT.keys()
        if word == "." or place + 1 == len(matches):
            sentences += 1
            whole = word == "." and SENTENCE.fullmatch(kinds) is not None
            missing = max(0, prompt.sentences - sentences) if place + 1 == len(matches) else 0
            reward += BAD_SENTENCE * ((not whole) + (sentences > prompt.sentences) + missing)
            kinds = ""
        found.append(Piece(*match.span(), reward))
    return found


def _of_word(prompt: Prompt, word: str) -> float:
    if word in prompt.keywords:
        return KEYWORD
    if word in FILLERS:
        return FILLER
    if word in TONE_OF:
        return RIGHT_TONE if TONE_OF[word] == prompt.tone else WRONG_TONE
    topic = NOUN_OF.get(word) or VERB_OF.get(word)
    return WRONG_TOPIC if topic not in (None, prompt.topic) else 0.0


def reward(prompt: Prompt, answer: str) -> float:
    """The known reward of an answer: the sum over its pieces."""
    found = pieces(prompt, answer)
    return sum(piece.reward for piece in found) if found else BAD_SENTENCE * prompt.sentences


def write(prompt: Prompt, quality: float, chance: random.Random) -> str:
    """An answer by a writer of some quality, 0 to 1."""
    return _Writer(prompt, quality, chance).answer()


class _Writer:
    """Writes one answer, word by word, and remembers which it used."""

    def __init__(self, prompt: Prompt, quality: float, chance: random.Random) -> None:
        self.prompt, self.quality, self.chance = prompt, quality, chance
        self.used: list[str] = []
        self.wanted = [word for word in prompt.keywords if chance.random() < 0.5 + 0.5 * quality]

    def answer(self) -> str:
        return "\n".join(self._sentence() for _ in range(self.prompt.sentences))  # so all begin with the same token

    def _sentence(self) -> str:
        words = [*self._object(), self._verb(), *self._object()]
        if self.chance.random() < 0.4:
            words += [self.chance.choice(PLACES), *self._object()]
        if self.chance.random() < 0.15 * (1 - self.quality):
            del words[self.chance.randrange(len(words))]
        return " ".join(words) + "."

    def _object(self) -> list[str]:
        return ["the", *(self._described() if self.chance.random() < 0.6 else []), self._noun()]

    def _described(self) -> list[str]:
        fills = self.chance.random() < 0.6 * (1 - self.quality)
        return [*([self.chance.choice(FILLERS)] if fills else []), self._adjective()]

    def _noun(self) -> str:
        if self.wanted and self.chance.random() < 0.6:
            return self._use([self.wanted.pop(0)])
        if self.chance.random() < 0.05:
            return self._use(OBJECTS)
        return self._use(TOPICS[self._topic()][0].split())

    def _verb(self) -> str:
        return self._use(TOPICS[self._topic()][1].split())

    def _topic(self) -> str:
        keeps = self.chance.random() < 0.65 + 0.33 * self.quality
        return self.prompt.topic if keeps else self.chance.choice(list(TOPICS))

    def _adjective(self) -> str:
        keeps = self.chance.random() < 0.35 + 0.6 * self.quality
        return self._use(TONES[self.prompt.tone if keeps else self.chance.choice(list(TONES))].split())

    def _use(self, words: Sequence[str]) -> str:
        """One of some words: one that is new, but for careless writers."""
        fresh = [word for word in words if word not in self.used]
        careless = self.chance.random() < 0.25 * (1 - self.quality)
        word = self.chance.choice(words if careless or not fresh else fresh)
        self.used.append(word)
        return word


def first_is_preferred(prompt: Prompt, first: str, second: str, chance: random.Random) -> bool:
    """A label as annotators give it: by the reward, with noise, and with a slight liking for length."""
    better = LABELS_PER_REWARD * (reward(prompt, first) - reward(prompt, second))
    longer = LABELS_PER_WORD * (len(first.split()) - len(second.split()))
    return chance.random() < 1 / (1 + math.exp(-better - longer))
