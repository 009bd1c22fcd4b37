"""Eight skills as prompt and completion: every row is a function of its seed, and no test prompt is ever trained on."""

# ruff: noqa: SIM905 (lists of words read better as a text)

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

MONTHS = "January February March April May June July August September October November December".split()
WORDS = (
    "apple bread cloud dance eagle field grape house ink jewel kite lemon mouse night ocean paper queen river stone "
    "table uncle voice water yacht zebra basket candle doctor engine flower garden hammer island jacket kitchen letter "
    "market needle orange pencil rabbit silver ticket window yellow bridge castle dragon forest guitar honey insect "
    "jungle ladder mirror nature onion planet rocket summer tiger valley winter"
).split()
SHORT = (
    "cat dog sun map red box pen cup hat jam key leg net owl pig rat sea tea van web arm bag cow day ear fox gum hen "
    "ice joy kid lip mud nut oil pot rug sky toe urn wax yak zip ant bed car den egg fan gas hot ink jet log man nap "
    "bird cake door fish game hand iron jump king lamp milk nest open park rain salt tree unit vest wind yard zone"
).split()
NAMES = (
    "Anna Boris Carla David Elena Felix Greta Henry Irene Jonas Karin Louis Maria Nadia Oscar Paula Ravi Sofia".split()
)
CITIES = "Oslo Paris Lima Cairo Delhi Tokyo Quito Accra Hanoi Sofia Dublin Berlin Madrid Athens Lisbon Prague".split()
UNITS = {("km", "m"): 1000, ("kg", "g"): 1000, ("m", "cm"): 100, ("hours", "minutes"): 60, ("minutes", "seconds"): 60}


def add(random: Random) -> tuple[str, str]:
    a, b = random.randint(10, 99), random.randint(1, 9)
    return f"Add: {a} + {b}", str(a + b)


def sort(random: Random) -> tuple[str, str]:
    words = random.sample(WORDS, 3)
    return f"Sort the words: {' '.join(words)}", " ".join(sorted(words))


def date(random: Random) -> tuple[str, str]:
    day, month, year = random.randint(1, 28), random.randint(1, 12), random.randint(1950, 2029)
    return f"Write as ISO date: {day} {MONTHS[month - 1]} {year}", f"{year}-{month:02}-{day:02}"


def convert(random: Random) -> tuple[str, str]:
    (big, small), factor = random.choice(sorted(UNITS.items()))
    n = random.randint(2, 250)
    return f"Convert: {n} {big} to {small}", f"{n * factor} {small}"


def extract(random: Random) -> tuple[str, str]:
    facts = {"name": random.choice(NAMES), "age": random.randint(18, 80), "city": random.choice(CITIES)}
    key = random.choice(sorted(facts))
    text = f"{facts['name']} is {facts['age']} and lives in {facts['city']}."
    return f"Extract the {key} as JSON: {text}", json.dumps({key: facts[key]})


def reverse(random: Random) -> tuple[str, str]:
    words = random.sample(SHORT, 2)
    return f"Spell backwards: {' '.join(words)}", " ".join("-".join(word[::-1]) for word in words)


def initials(random: Random) -> tuple[str, str]:
    words = random.sample(WORDS, 4)
    return f"Give the initials: {' '.join(words)}", "".join(word[0] for word in words).upper()


def last(random: Random) -> tuple[str, str]:
    words = random.sample(WORDS, random.randint(3, 5))
    return f"Say the last word twice: {' '.join(words)}", f"{words[-1]} {words[-1]}"


SKILLS: dict[str, Callable[[Random], tuple[str, str]]] = {
    f.__name__: f for f in (add, sort, date, convert, extract, reverse, initials, last)
}


LEARNED_FIRST = ("add", "date", "extract", "last")
"""Those that a small model learns within a minute or two."""


def is_test(prompt: str) -> bool:
    """One prompt in five is for testing, by its digest; so the splits cannot overlap, whatever is drawn."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 5 == 0


def rows(skill: str, test: bool, seed: int = 0) -> Iterator[dict[str, str]]:
    """Different rows of a skill, always the same ones, until (almost) no new one is left."""
    random, seen, misses = Random(f"{seed} {skill} {test}"), set(), 0
    while misses < 1000:
        prompt, completion = SKILLS[skill](random)
        misses += 1
        if is_test(prompt) is test and prompt not in seen:
            seen.add(prompt)
            misses = 0
            yield {"task": skill, "prompt": prompt, "completion": completion}


def write(folder: Path, train: int = 500, test: int = 32, skills: Iterable[str] = tuple(SKILLS)) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with so many rows of every one of these skills."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        lines = [json.dumps(row) for skill in skills for row in islice(rows(skill, name == "test"), count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
