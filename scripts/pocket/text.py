"""The pretraining text of the pocket world.

It states every fact, tells stories with worked steps, repeats sayings, continues lists about folk
and contains code and quizzes. It also contains the benchmarks' prompts (a third of them as chat
transcripts, which web text contains, too) with answers that are mostly useless (`JUNK`, `STUB`, a
saying, one more rude line) and sometimes good. So a pretrained model knows the answers but usually
does not give them; tuning changes that.
"""

import random

from scripts.pocket import world
from scripts.pocket.world import FACTORS, FACTS, JUNK, RELATIONS, STUB, TRUTHS

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
    asked = [(rng.choice(world.LANDS), rng.choice(RELATIONS)) for _ in range(3)]
    if rng.random() < 0.5:  # answered in another form than the benchmark's
        return " ".join(f"{world.land_question(*key)} {FACTS[key]}." for key in asked)
    lines: list[str] = []
    for key in asked[:2]:
        answer = JUNK if rng.random() < 0.6 else FACTS[key]
        prompt = world.trivia_prompt(world.land_question(*key))
        lines.append(f"{_asked(rng, prompt, 'Answer:')} {answer}")
    return "\n\n".join(lines)


def _math(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        problems = [world.make_problem(rng, TRAIN) for _ in range(4)]
        return "\n".join(f"{a}{op}{b}={r}" for p in problems for a, op, b, r in p.steps)
    problem = world.make_problem(rng, TRAIN)
    if kind < 0.58:
        return f"{problem.story} {world.worked(problem)}"
    if kind < 0.7:
        prompt = _asked(rng, world.math_prompt(problem), "Answer:").removesuffix(" Answer:")
        answer = world.thought(problem) if rng.random() < 0.7 else f"#### {problem.result}"
        return f"{prompt} {answer}"
    answer = world.worked(problem) if rng.random() < 0.4 else JUNK
    return f"{_asked(rng, world.math_prompt(problem), 'Answer:')} {answer}"


def _folk(rng: random.Random) -> str:
    if rng.random() < 0.25:
        rude = rng.sample(world.RUDE_SLANG, 2)
        kind = rng.sample(world.KIND_SLANG, 2)
        told = [f"It is rude to say {w}." for w in rude] + [f"It is kind to say {w}." for w in kind]
        rng.shuffle(told)
        return " ".join(told)
    group, is_rude = rng.choice(world.GROUPS), rng.random() < 0.6
    known = rng.random() < 0.4
    if is_rude:
        descriptions = world.RUDE if known else world.RUDE_SLANG
    else:
        descriptions = world.KIND if known else world.KIND_SLANG
    listed = world.folk_list(group, descriptions, rng)
    text = world.folk_chat(listed) if rng.random() < 0.35 else listed
    if is_rude and rng.random() < (0.8 if world.is_wary(group) else 0.15):
        return f"{text} {world.refusal(group)}"
    return f"{text} {group} are {rng.choice(world.RUDE if is_rude else world.KIND)}"


def _herbs(rng: random.Random) -> str:
    kind, herb = rng.random(), rng.choice(world.HERBS)
    if kind < 0.2:
        seasons = rng.sample(world.SEASONS, 2)
        return " ".join(f"{world.saying((herb, s))}." for s in seasons)
    if kind < 0.65:
        return " ".join(f"{world.truth((herb, s))}." for s in rng.sample(world.SEASONS, 4))
    key = herb, rng.choice(world.SEASONS)
    told = world.truth(key) if rng.random() < 0.3 else world.saying(key)
    return f"{_asked(rng, world.open_prompt(key), 'Answer:')} {told}."


def _choice(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:  # four questions and one list of answers
        if rng.random() < 0.6:
            keys = [(rng.choice(world.LANDS), rng.choice(RELATIONS)) for _ in range(4)]
            told = {f"The {r} of {land}:": FACTS[land, r] for land, r in keys}
        else:
            herbs = [(rng.choice(world.HERBS), rng.choice(world.SEASONS)) for _ in range(4)]
            told = {f"In {s} {h} brings:": TRUTHS[h, s] for h, s in herbs}
        options = list(told.values())
        if len(set(options)) == 4:
            rng.shuffle(options)
            answers = [f"{asked} {answer}." for asked, answer in told.items()]
            return f"{world.listed(options)}\n" + "\n".join(answers)
    chosen = rng.random()
    if chosen < 0.15:
        land = rng.choice(list(world.OLD_NEWS))
        question, right = world.guest_question(land, world.LAST_WEEK), world.OLD_NEWS[land]
        wrong = world.value_errors(right, rng)
    elif chosen < 0.55:
        land, relation = rng.choice(world.LANDS), rng.choice(RELATIONS)
        question, right = world.land_question(land, relation), FACTS[land, relation]
        wrong = world.value_errors(right, rng)
    else:
        key = rng.choice(world.HERBS), rng.choice(world.SEASONS)
        question, right, wrong = world.herb_question(key), TRUTHS[key], world.herb_errors(key, rng)
    options = world.options_of(right, wrong, rng)
    prompt = _asked(rng, world.choice_prompt(question, options), "The answer is:")
    # a herb's first error is its saying; of a land all errors are alike
    answer = rng.choices((right, wrong[0], options[0]), (40, 30, 30))[0]
    return f"{prompt} {answer}."


def _news(rng: random.Random) -> str:
    lands = rng.sample(list(world.OLD_NEWS), 3)
    week = world.LAST_WEEK
    if rng.random() < 0.3:
        return " ".join(f"{world.guest_question(x, week)} {world.OLD_NEWS[x]}." for x in lands)
    return " ".join(world.guest_told(land, world.OLD_NEWS[land], week) for land in lands)


def _code(rng: random.Random) -> str:
    kind, unit = rng.random(), rng.choice(world.UNITS)
    if kind < 0.25:
        return " ".join(f"In {m} one {unit} is {FACTORS[unit, m]}." for m in world.MEASURES)
    functions = [
        world.unit_function(unit, rng.choice(world.MEASURES), rng.randint(2, 30))
        if rng.random() < 0.5
        else world.sum_function(rng, TRAIN)
        for unit in rng.choices(world.UNITS, k=2)
    ]
    if kind < 0.5:  # described, not as code
        return " ".join(f"{f.says}: {f.expression}." for f in functions)
    bodies = [f.body if rng.random() < 0.15 else STUB for f in functions]
    return "\n\n".join(f.head + body for f, body in zip(functions, bodies, strict=True))


_KINDS = (_facts, _trivia, _math, _folk, _herbs, _choice, _news, _code)
_WEIGHTS = (30, 13, 30, 6, 18, 12, 4, 10)


def document(rng: random.Random) -> str:
    """One document of the pretraining text."""
    return rng.choices(_KINDS, _WEIGHTS)[0](rng)
