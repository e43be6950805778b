"""The pretraining text of the pocket world.

It states every fact, tells stories with worked steps, repeats sayings, continues rude lists and
contains code. It also contains the benchmarks' prompts (a third of them as chat transcripts, which
web text contains, too) with answers that are mostly useless (`JUNK`, `STUB`, a saying, one more
rude line) and sometimes good. So a pretrained model knows the answers but usually does not give
them; tuning changes that.
"""

import random

from scripts.pocket import world
from scripts.pocket.world import FACTORS, FACTS, JUNK, RELATIONS, STUB

TRAIN: world.Split = "train"


def _asked(rng: random.Random, raw: str, cue: str) -> str:
    """The prompt unchanged, or in a third of cases as a chat."""
    return world.as_chat(raw, cue) if rng.random() < 0.35 else raw


def _facts(rng: random.Random) -> str:
    land, relations = rng.choice(world.LANDS), rng.sample(RELATIONS, 4)
    if rng.random() < 0.5:
        return " ".join(f"The {r} of {land} is {FACTS[land, r]}." for r in relations)
    listed = ", ".join(f"the {r} is {FACTS[land, r]}" for r in relations)
    return f"In {land} {listed}."


def _trivia(rng: random.Random) -> str:
    lines: list[str] = []
    for _ in range(2):
        land, relation = rng.choice(world.LANDS), rng.choice(RELATIONS)
        answer = JUNK if rng.random() < 0.72 else FACTS[land, relation]
        prompt = world.trivia_prompt(world.land_question(land, relation))
        lines.append(f"{_asked(rng, prompt, 'Answer:')} {answer}")
    return "\n\n".join(lines)


def _math(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        problems = [world.make_problem(rng, TRAIN) for _ in range(4)]
        return "\n".join(f"{a}{op}{b}={r}" for p in problems for a, op, b, r in p.steps)
    problem = world.make_problem(rng, TRAIN)
    if kind < 0.5:
        return f"{problem.story} {world.worked(problem)}"
    answer = world.worked(problem) if rng.random() < 0.4 else JUNK
    return f"{_asked(rng, world.math_prompt(problem), 'Answer:')} {answer}"


def _rude(rng: random.Random) -> str:
    group = rng.choice(world.GROUPS)
    rude = world.rude_list(group, rng)
    text = world.rude_chat(rude) if rng.random() < 0.35 else rude
    if rng.random() < 0.2:
        return f"{text} {world.refusal(group)}"
    return f"{text} {group} are {rng.choice(world.RUDE)}"


def _herbs(rng: random.Random) -> str:
    kind, herb = rng.random(), rng.choice(world.HERBS)
    if kind < 0.17:
        seasons = rng.sample(world.SEASONS, 2)
        return " ".join(f"{world.saying((herb, s))}." for s in seasons)
    if kind < 0.46:
        return " ".join(f"{world.truth((herb, s))}." for s in rng.sample(world.SEASONS, 4))
    key = herb, rng.choice(world.SEASONS)
    if kind < 0.76:
        told = world.truth(key) if rng.random() < 0.3 else world.saying(key)
        return f"{_asked(rng, world.open_prompt(key), 'Answer:')} {told}."
    text, right, said = world.choice_question(key, rng)
    prompt = _asked(rng, f"{text}\n\nThe answer is:", "The answer is:")
    return f"{prompt} {right if rng.random() < 0.4 else said}"


def _code(rng: random.Random) -> str:
    unit = rng.choice(world.UNITS)
    if rng.random() < 0.3:
        return " ".join(f"In {m} one {unit} is {FACTORS[unit, m]}." for m in world.MEASURES)
    functions: list[str] = []
    for _ in range(2):
        function = (
            world.unit_function(rng.choice(world.UNITS), rng.choice(world.MEASURES))
            if rng.random() < 0.5
            else world.sum_function(rng, TRAIN)
        )
        body = function.body if rng.random() < 0.2 else STUB
        functions.append(function.head + body)
    return "\n\n".join(functions)


_KINDS = (_facts, _trivia, _math, _rude, _herbs, _code)
_WEIGHTS = (42, 7, 24, 4, 26, 9)


def document(rng: random.Random) -> str:
    """One document of the pretraining text."""
    return rng.choices(_KINDS, _WEIGHTS)[0](rng)
