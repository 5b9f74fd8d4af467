"""The grammar of the synthetic language: a tale with a cast, facts told and asked for later, copying and counting."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from radlads_jax.data import words

_Kind = Literal["plain", "answer", "mention", "copy", "count"]
# How a fact of each topic is told, and the same words answer; and what it may say. The name stands right before the
# value, and all facts of a tale are of one topic: only the name tells which of its values is asked for.
_BINDINGS = {"food": "We give {}", "town": "We show {}", "number": "We pay {}", "colour": "We paint {}"}
_VALUES = {"food": words.FOODS, "town": words.TOWNS, "number": words.NUMBERS, "colour": words.COLOURS}


class Span(NamedTuple):
    """A part of a document; every kind but "plain" follows with certainty from the text before it.

    answer: what a question asks for, or a fact told again; mention: what returns inside another sentence, like an
    animal's colour.
    """

    text: str
    kind: _Kind


@dataclass(frozen=True)
class _Person:
    """One of the cast, by his or her work, with the pronoun that agrees."""

    work: str
    pronoun: str


@dataclass(frozen=True)
class _Creature:
    """An animal or a group of them, called by the same words throughout a tale: "the small grey dogs"."""

    size: str
    colour: str
    noun: str
    many: bool

    @property
    def tail(self) -> str:
        """What follows the size: certain once the creature is known."""
        return f" {self.colour} {words.plural(self.noun) if self.many else self.noun}"

    def agree(self, verb: str) -> str:
        """The verb in this creature's number."""
        return verb if self.many else words.singular_verb(verb)


class _Fact(NamedTuple):
    """A name bound to a value."""

    name: str
    value: str


@dataclass
class Tale:
    """A document in the making: its spans so far, its random numbers, its cast and the facts that may be asked.

    names: of those whom the facts are about, in the order in which they will be told. They stand nowhere else.
    """

    rng: random.Random
    people: list[_Person]
    creatures: list[_Creature]
    topic: str
    names: list[str]
    spans: list[Span] = field(default_factory=list)
    facts: list[_Fact] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    last_asked: _Fact | None = None
    length: int = 0

    def say(self, text: str, certain: str = "", kind: _Kind = "mention", end: str = "") -> None:
        """Append text, then what follows from the text so far, then an ending."""
        for span in (Span(text, "plain"), Span(certain, kind), Span(end, "plain")):
            if span.text:
                self.spans.append(span)
                self.length += sum(span.text.count(mark) for mark in " .,:?")

    def someone(self) -> str:
        """Anyone of the cast, at a sentence's beginning."""
        return f" The {self.rng.choice(self.people).work}"

    def binding(self, name: str) -> str:
        """How the fact about this name begins."""
        return _BINDINGS[self.topic].format(name)


def begin(rng: random.Random) -> Tale:
    """Draw the cast and write the opening line."""
    pool = [_Person(work, "he") for work in words.HE_WORKS] + [_Person(work, "she") for work in words.SHE_WORKS]
    tale = Tale(
        rng,
        people=rng.sample(pool, 2),
        creatures=[
            _Creature(size, rng.choice(words.COLOURS), noun, rng.random() < 0.4)
            for size, noun in zip(rng.sample(words.SIZES, 2), rng.sample(list(words.CREATURES), 2), strict=True)
        ],
        topic=rng.choice(list(_BINDINGS)),
        names=rng.sample(words.NAMES, rng.randint(3, 6)),
    )
    tale.say(f"This is a tale of the {tale.people[0].work} and the {tale.people[1].work}.")
    return tale


# Facts: told once, asked for later.


def tell(tale: Tale) -> None:
    """Bind the next name to a value that no other has."""
    name, used = tale.names[len(tale.facts)], {fact.value for fact in tale.facts}
    fact = _Fact(name, tale.rng.choice([value for value in _VALUES[tale.topic] if value not in used]))
    tale.say(f" {tale.binding(name)} {fact.value}.")
    tale.facts.append(fact)


def ask(tale: Tale, fact: _Fact | None = None) -> None:
    """Ask for a fact and answer from memory in the words that told it."""
    fact = fact or tale.rng.choice([each for each in tale.facts if each is not tale.last_asked])
    tale.last_asked = fact
    tale.asked.add(fact.name)
    tale.say(f" What do {_small(tale.binding(fact.name))}? {tale.binding(fact.name)}", f" {fact.value}", "answer", ".")


def _use(tale: Tale) -> None:
    """Let a fact return inside the tale, without a question."""
    fact = tale.rng.choice(tale.facts)
    when = tale.rng.choice(words.TIMES)
    tale.say(f" {when} {_small(tale.binding(fact.name))}", f" {fact.value}", end=" again.")


def _retell(tale: Tale) -> None:
    """Every fact once more, in any order and in the words that told it."""
    tale.say(" Once more:")
    for fact in tale.rng.sample(tale.facts, len(tale.facts)):
        tale.say(f" {tale.binding(fact.name)}", f" {fact.value}", "answer", ".")


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


# Plain grammar.


def _plain(tale: Tale) -> None:
    """A grammatical sentence about the cast or its animals, sometimes followed by one with a pronoun."""
    tale.say(" The")
    _does(tale)


def scene(tale: Tale) -> None:
    """A new paragraph, opened by a time of day or year."""
    tale.say(f"\n{tale.rng.choice(words.TIMES)} the")
    _does(tale)


def _does(tale: Tale) -> None:
    if tale.rng.random() < 0.65:
        _creature_does(tale, tale.rng.choice(tale.creatures))
    else:
        _person_does(tale, tale.rng.choice(tale.people))


def _creature_does(tale: Tale, creature: _Creature) -> None:
    tale.say(f" {creature.size}")
    if creature.noun in tale.seen:
        tale.say("", creature.tail)
    else:
        tale.say(creature.tail)
        tale.seen.add(creature.noun)
    verb = creature.agree(tale.rng.choices(words.CREATURES[creature.noun], weights=(6, 2, 1))[0])
    other = next(each for each in tale.creatures if each is not creature)
    roll = tale.rng.random()
    if roll < 0.2 and other.noun in tale.seen:
        # The last verb agrees with the first noun, not with the nearer one.
        seeing = creature.agree(tale.rng.choice(words.SEEING))
        tale.say(f" that {seeing} the {other.size}", other.tail, end=f" {verb}.")
    elif roll < 0.6:
        tale.say(f" {verb} {_somewhere(tale)}.")
    else:
        tale.say(f" {verb} {tale.rng.choice(words.ADVERBS)}.")
    if tale.rng.random() < 0.3:
        tale.say(f" {'They are' if creature.many else 'It is'} {tale.rng.choice(words.FEELINGS)}.")


def _person_does(tale: Tale, person: _Person) -> None:
    where = _somewhere(tale) if tale.rng.random() < 0.5 else f"in the {tale.rng.choice(words.WEATHER)}"
    tale.say(f" {person.work} {words.singular_verb(tale.rng.choice(words.DEEDS))} {where}")
    if tale.rng.random() < 0.5:
        tale.say(" because", f" {person.pronoun}", end=f" is {tale.rng.choice(words.FEELINGS)}")
    tale.say(".")


def _somewhere(tale: Tale) -> str:
    return f"{tale.rng.choice(words.PREPOSITIONS)} the {tale.rng.choice(words.PLACES)}"


# Copying and counting.


def _repeat(tale: Tale) -> None:
    """A random list of words or letters, said twice, or every word of it once more with the next one, in any order.

    A list said twice can be copied by counting its words. Pairs can not: they teach to look a word up, as facts need.
    """
    if tale.rng.random() < 0.6:
        others = [name for name in words.NAMES if name not in tale.names]
        verb, items = "says", tale.rng.sample([*words.LIST_WORDS, *others], tale.rng.randint(3, 9))
    else:
        verb, items = "spells", tale.rng.sample(words.LETTERS, tale.rng.randint(4, 9))
    tale.say(f"{tale.someone()} {verb}: {' '.join(items)}.")
    if tale.rng.random() < 0.2:
        _plain(tale)
    if tale.rng.random() < 0.4:
        tale.say(f"{tale.someone()} repeats:", f" {' '.join(items)}.", "copy")
        return
    tale.say(f"{tale.someone()} repeats in pairs:")
    pairs = list(itertools.pairwise(items))
    for i, (first, second) in enumerate(tale.rng.sample(pairs, len(pairs))):
        tale.say(f"{',' if i else ''} {first}", f" {second}", "copy")
    tale.say(".")


def _count(tale: Tale) -> None:
    """A sequence, a sum, the length of a list, or the next day."""
    rng, number = tale.rng, words.NUMBERS
    form = rng.choice(("up", "down", "twos", "list", "list", "sum", "sum", "day", "day", "day"))
    if form in ("up", "down", "twos"):
        step = {"up": 1, "down": -1, "twos": 2}[form]
        steps = rng.randint(3, 7)
        start = rng.randint(steps, 19) if step < 0 else rng.randint(0, 19 - step * steps)
        last = start + step * steps
        run = ", ".join(number[i] for i in range(start, last + step, step))
        how = {"up": "counts", "down": "counts down", "twos": "counts by two"}[form]
        tale.say(f"{tale.someone()} {how} from {number[start]} to {number[last]}:", f" {run}.", "count")
    elif form == "list":
        items = rng.sample(words.OBJECTS, rng.randint(2, 6))
        listed = ", ".join(f"a {item}" for item in items[:-1]) + f" and a {items[-1]}"
        tale.say(f"{tale.someone()} sees {listed}. That is", f" {number[len(items) - 1]} things.", "count")
    elif form == "sum":
        left, right, food = rng.randint(2, 9), rng.randint(1, 9), rng.choice(words.FOODS[:3])
        tale.say(f"{tale.someone()} has {number[left - 1]} bags of {food} and finds {number[right - 1]} more.")
        tale.say(" That makes", f" {number[left + right - 1]} bags of {food}.", "count")
    else:
        today = rng.randrange(7)
        tale.say(f" Today is {words.DAYS[today]}. Tomorrow is", f" {words.DAYS[(today + 1) % 7]}.", "count")


PASSAGES: dict[str, Callable[[Tale], None]] = {
    "tell": tell,
    "ask": ask,
    "use": _use,
    "retell": _retell,
    "plain": _plain,
    "repeat": _repeat,
    "count": _count,
}
