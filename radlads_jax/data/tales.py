"""The grammar of the synthetic language: a tale with a cast, facts told and asked for later, copying and counting."""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from radlads_jax.data import words

_Kind = Literal["plain", "answer", "mention", "copy", "count"]
_PERSONAL = ("holding", "food", "home", "number")
# How a fact is told, and the same words answer.
_BINDINGS = {
    "place": "The {} is",
    "holding": "{} has a",
    "food": "{} likes",
    "home": "{} lives in",
    "number": "The number of {} is",
}
_QUESTIONS = {
    "place": "Where is the {}?",
    "holding": "What does {} have?",
    "food": "What does {} like?",
    "home": "Where does {} live?",
    "number": "What is the number of {}?",
}
_BACKWARD = {"holding": "Who has the {}?", "food": "Who likes {}?", "home": "Who lives in {}?"}


class Span(NamedTuple):
    """A part of a document; every kind but "plain" follows with certainty from the text before it.

    answer: what a question asks for, or a fact told again; mention: what returns inside another sentence, like an
    animal's colour or where one lives.
    """

    text: str
    kind: _Kind


@dataclass(frozen=True)
class _Person:
    """One of the cast, with the pronouns that agree with the name."""

    name: str
    subject: str
    possessive: str


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


@dataclass
class _Fact:
    """A name bound to a value: `about` is who or what, `value` what will be asked for."""

    topic: str
    about: str
    value: str

    def words(self) -> set[str]:
        """Its words, of a number its digits: a new fact of the tale takes none of them, but for a preposition."""
        return {self.about, *(self.value if self.topic == "number" else self.value.split())}


@dataclass
class Tale:
    """A document in the making: its spans so far, its random numbers, its cast and the facts that may be asked."""

    rng: random.Random
    spans: list[Span] = field(default_factory=list)
    people: list[_Person] = field(default_factory=list)
    creatures: list[_Creature] = field(default_factory=list)
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

    def person(self) -> _Person:
        """Anyone of the cast."""
        return self.rng.choice(self.people)

    def unused(self, options: tuple[str, ...], used: Collection[str]) -> str:
        """An option that no fact has used yet, so that a question has one answer."""
        return self.rng.choice([option for option in options if option not in used])


def begin(rng: random.Random) -> Tale:
    """Draw the cast and write the opening line."""
    tale = Tale(rng)
    pool = [_Person(name, "he", "his") for name in words.HE_NAMES]
    pool += [_Person(name, "she", "her") for name in words.SHE_NAMES]
    tale.people = rng.sample(pool, rng.choice((2, 3, 3, 4)))
    for size, noun in zip(rng.sample(words.SIZES, 2), rng.sample(list(words.CREATURES), 2), strict=True):
        tale.creatures.append(_Creature(size, rng.choice(words.COLOURS), noun, rng.random() < 0.4))
    names = [person.name for person in tale.people]
    tale.say(f"This is a tale of {', '.join(names[:-1])} and {names[-1]}.")
    return tale


# Facts: told once, asked for later.


def tell(tale: Tale) -> None:
    """Bind a name to a new fact; at most one fact of a topic about the same name, and no word in two of them."""
    rng = tale.rng
    known = {(fact.topic, fact.about) for fact in tale.facts}
    used = {word for fact in tale.facts for word in fact.words()}
    used |= {creature.colour for creature in tale.creatures}
    digits = [digit for digit in "0123456789" if digit not in used]
    topics = [topic for topic in _PERSONAL if topic != "number" or len(digits) >= 3]
    free = [person for person in tale.people if any((topic, person.name) not in known for topic in topics)]
    if not free or rng.random() < 0.2:
        thing = tale.unused(words.OBJECTS, used)
        fact = _Fact("place", thing, _somewhere(tale, used))
        tale.say(f" The {thing} is {fact.value}.")
        tale.facts.append(fact)
        return
    name = rng.choice(free).name
    topic = rng.choice([topic for topic in topics if (topic, name) not in known])
    if topic == "holding":
        fact = _Fact("holding", name, f"{tale.unused(words.COLOURS, used)} {tale.unused(words.OBJECTS, used)}")
    elif topic == "food":
        fact = _Fact("food", name, tale.unused(words.FOODS, used))
    elif topic == "home":
        fact = _Fact("home", name, tale.unused(words.TOWNS, used))
    else:
        fact = _Fact("number", name, "".join(rng.sample(digits, 3)))
    tale.say(f" {_BINDINGS[topic].format(name)} {fact.value}.")
    tale.facts.append(fact)


def ask(tale: Tale, fact: _Fact | None = None) -> None:
    """Ask for a fact and answer from memory in the words that told it, or, of a person, from the other end."""
    fact = fact or tale.rng.choice([each for each in tale.facts if each is not tale.last_asked])
    tale.last_asked = fact
    tale.asked.add(fact.topic + fact.about)
    if fact.topic in _BACKWARD and tale.rng.random() < 0.25:
        tale.say(f" {_BACKWARD[fact.topic].format(fact.value)}", f" {fact.about}", "answer", ".")
        return
    question, binding = _QUESTIONS[fact.topic].format(fact.about), _BINDINGS[fact.topic].format(fact.about)
    tale.say(f" {question} {binding}", f" {fact.value}", "answer", ".")


def _use(tale: Tale) -> None:
    """Let a fact return inside the tale, without a question."""
    fact = tale.rng.choice(tale.facts)
    owner = next((person for person in tale.people if person.name == fact.about), None)
    if fact.topic == "place":
        tale.say(f" {tale.person().name} finds the {fact.about}", f" {fact.value}", end=".")
    elif owner is not None and fact.topic == "holding":
        tale.say(
            f" {owner.name} {tale.rng.choice(('looks at', 'takes'))} {owner.possessive}", f" {fact.value}", end="."
        )
    elif owner is not None and fact.topic == "food":
        tale.say(f" {owner.name} is hungry and eats some", f" {fact.value}", end=".")
    elif owner is not None and fact.topic == "home":
        tale.say(f" {owner.name} walks home to", f" {fact.value}", end=".")
    else:
        ask(tale, fact)


def _change(tale: Tale) -> None:
    """Overwrite a fact: a thing moves, or passes to someone with empty hands."""
    holders = {fact.about for fact in tale.facts if fact.topic == "holding"}
    empty = [person.name for person in tale.people if person.name not in holders]
    movable = [f for f in tale.facts if f.topic == "place" or (f.topic == "holding" and empty)]
    if not movable:
        tell(tale)
        return
    fact = tale.rng.choice(movable)
    if fact.topic == "place":
        fact.value = _somewhere(tale, {word for each in tale.facts for word in each.words()})
        tale.say(f" Now {tale.person().name} puts the {fact.about} {fact.value}. The {fact.about} is", f" {fact.value}")
    else:
        receiver = tale.rng.choice(empty)
        tale.say(f" Now {fact.about} gives the", f" {fact.value}", end=f" to {receiver}. {receiver} has a")
        tale.say("", f" {fact.value}")
        fact.about = receiver
    tale.say(".")
    tale.asked.discard(fact.topic + fact.about)


def _retell(tale: Tale) -> None:
    """Every fact once more, in any order and in the words that told it."""
    tale.say(" Once more:")
    for fact in tale.rng.sample(tale.facts, len(tale.facts)):
        tale.say(f" {_BINDINGS[fact.topic].format(fact.about)}", f" {fact.value}", "answer", ".")


# Plain grammar.


def _plain(tale: Tale) -> None:
    """A grammatical sentence about the cast or its animals, sometimes followed by one with a pronoun."""
    if tale.rng.random() < 0.65:
        tale.say(" The")
        _creature_does(tale, tale.rng.choice(tale.creatures))
    else:
        _person_does(tale, tale.person())


def scene(tale: Tale) -> None:
    """A new paragraph, opened by a time of day or year."""
    tale.say(f"\n{tale.rng.choice(words.TIMES)}")
    if tale.rng.random() < 0.65:
        tale.say(" the")
        _creature_does(tale, tale.rng.choice(tale.creatures))
    else:
        _person_does(tale, tale.person())


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
    tale.say(f" {person.name} {words.singular_verb(tale.rng.choice(words.DEEDS))} {where}")
    if tale.rng.random() < 0.5:
        tale.say(" because", f" {person.subject}", end=f" is {tale.rng.choice(words.FEELINGS)}")
    tale.say(".")


def _somewhere(tale: Tale, used: Collection[str] = ()) -> str:
    return f"{tale.rng.choice(words.PREPOSITIONS)} the {tale.unused(words.PLACES, used)}"


# Copying and counting.


def _repeat(tale: Tale) -> None:
    """A random list of words or letters, said twice, sometimes with a sentence in between."""
    if tale.rng.random() < 0.6:
        items = " ".join(tale.rng.sample(words.LIST_WORDS, tale.rng.randint(3, 9)))
        tale.say(f" {tale.person().name} says: {items}.")
    else:
        items = " ".join(tale.rng.sample(words.LETTERS, tale.rng.randint(4, 9)))
        tale.say(f" {tale.person().name} spells: {items}.")
    if tale.rng.random() < 0.2:
        _plain(tale)
    tale.say(f" {tale.person().name} repeats:", f" {items}.", "copy")


def _count(tale: Tale) -> None:
    """A sequence, a sum, the length of a list, or the next day."""
    rng, number = tale.rng, words.NUMBERS
    form = rng.choice(("up", "down", "twos", "list", "list", "sum", "sum", "day"))
    if form in ("up", "down", "twos"):
        step = {"up": 1, "down": -1, "twos": 2}[form]
        steps = rng.randint(3, 7)
        start = rng.randint(steps, 19) if step < 0 else rng.randint(0, 19 - step * steps)
        last = start + step * steps
        run = ", ".join(number[i] for i in range(start, last + step, step))
        how = {"up": "counts", "down": "counts down", "twos": "counts by two"}[form]
        tale.say(f" {tale.person().name} {how} from {number[start]} to {number[last]}:", f" {run}.", "count")
    elif form == "list":
        items = rng.sample(words.OBJECTS, rng.randint(2, 6))
        listed = ", ".join(f"a {item}" for item in items[:-1]) + f" and a {items[-1]}"
        tale.say(f" {tale.person().name} sees {listed}. That is", f" {number[len(items) - 1]} things.", "count")
    elif form == "sum":
        left, right, food = rng.randint(2, 9), rng.randint(1, 9), rng.choice(words.FOODS[:3])
        tale.say(f" {tale.person().name} has {number[left - 1]} bags of {food} and finds {number[right - 1]} more.")
        tale.say(" That makes", f" {number[left + right - 1]} bags of {food}.", "count")
    else:
        today = rng.randrange(7)
        tale.say(f" Today is {words.DAYS[today]}. Tomorrow is", f" {words.DAYS[(today + 1) % 7]}.", "count")


PASSAGES: dict[str, Callable[[Tale], None]] = {
    "tell": tell,
    "ask": ask,
    "use": _use,
    "retell": _retell,
    "change": _change,
    "plain": _plain,
    "repeat": _repeat,
    "count": _count,
}
