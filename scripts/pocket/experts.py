"""Measures what the pocket family's other experts and formulas do, three tuning seeds each.

    python -m scripts.pocket.experts     # `make pocket-experts`; `make pocket` makes its models

results/pocket/experts.csv gets, on the test split: each of two skills' experts alone and both as
two pairs; the expert that thinks; the shift gated by the base's largest probability. And on dev,
where knobs are looked at: alphas, and experts that were tuned for shorter and longer. Finished runs
are not made again.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from proxytune.files import ROOT
from scripts.pocket import build
from scripts.pocket.world import Split

ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)
SHARES = (0.5, 1.0)  # of each of two pairs
THRESHOLDS = (0.4, 0.7, 0.95)
STEPS = (150, 600)  # the shipped expert's are in build.TUNED
SKILLS = ("arithmetic", "knowledge")
TASKS = ("gsm8k", "triviaqa")
COLUMNS = ("run", *build.COLUMNS)


@dataclass(frozen=True)
class Measured:
    """One run of run.py.

    Attributes:
        name: in the table and of its folder.
        seed: of the tuning.
        tasks: keys of `build.TASKS`.
        systems: as in run.py.
        settings: what else run.py is told.
        split: test, or dev for knobs.
    """

    name: str
    seed: int
    tasks: Sequence[str]
    systems: Sequence[str]
    settings: Sequence[str]
    split: Split = "test"

    def figures(self, work: Path) -> list[build.Figure]:
        """Runs it, or goes on with what the work folder has."""
        settings = [
            "experiment=pocket",
            f"task=[{','.join(f'pocket_{task}' for task in self.tasks)}]",
            f"systems=[{','.join(self.systems)}]",
            *self.settings,
            *build.on_split(self.split, self.tasks),
        ]
        output = work / f"seed{self.seed}" / f"{self.split}_{self.name.replace(' ', '_')}"
        return [row | {"run": self.name} for row in build.measure(output, self.seed, settings)]


def comparisons(seed: int, models: Path) -> Iterator[Measured]:
    """The runs on test.

    Args:
        seed: of the tuning.
        models: its folder of tuned models.
    """

    def one(role: str) -> str:
        return f"triple.expert.id={models / role}"

    for skill in SKILLS:
        settings = [f"triple=pocket_{skill}", one(f"expert_{skill}")]
        yield Measured(skill, seed, TASKS, ("base", "expert", "proxy"), settings)
    pairs = [f"triple.pairs.{skill}.expert.id={models / f'expert_{skill}'}" for skill in SKILLS]
    for alpha in SHARES:
        both = ["triple=pocket_skills", f"alpha={alpha}", *pairs]
        yield Measured(f"both skills {alpha}", seed, TASKS, ("proxy",), both)
    thinking = ["triple=pocket_thinking", one("expert_thinking")]
    yield Measured("thinking", seed, ("gsm8k",), ("base", "expert", "proxy"), thinking)
    yield Measured("fixed", seed, TASKS, ("proxy",), [one("expert")])
    for threshold in THRESHOLDS:
        gated = ["formula=gated", f"formula.threshold={threshold}", one("expert")]
        yield Measured(f"gated {threshold}", seed, TASKS, ("proxy",), gated)


def knobs(work: Path) -> Iterator[Measured]:
    """The runs on dev, with the first seed's models."""
    tasks = ("gsm8k", "triviaqa", "truthfulqa_open", "truthfulqa_mc")
    expert = f"triple.expert.id={work / 'seed1' / 'expert'}"
    for alpha in ALPHAS:
        yield Measured(
            f"alpha {alpha}", 1, tasks, ("proxy",), [expert, f"alpha={alpha}"], split="dev"
        )
    for steps in STEPS:
        other = f"triple.expert.id={work / 'seed1' / f'expert_{steps}'}"
        yield Measured(f"{steps} steps", 1, tasks, ("expert", "proxy"), [other], split="dev")


def main() -> None:
    """Reads the command line, tunes the experts that only this script needs, and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "runs" / "pocket_build")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    with ThreadPoolExecutor(build.PROCESSES) as pool:
        others = {f"expert_{n}": replace(build.TUNED["expert"], steps=n) for n in STEPS}
        list(pool.map(lambda role: build.tune(args.work, 1, role, others[role]), others))
        runs = [r for s in args.seeds for r in comparisons(s, args.work / f"seed{s}")]
        runs += knobs(args.work)
        found = pool.map(lambda run: run.figures(args.work), runs)
        rows = [row for rows in found for row in rows]
    build.write_figures(build.RESULTS / "experts.csv", rows, COLUMNS)


if __name__ == "__main__":
    main()
