"""Grades answers to MATH-500; lm-eval imports it by its path.

A document: {"problem": "Convert the point $(0,3)$ ...", "solution": "... $\\boxed{\\left( 3, ...",
"answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2, ...}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import extra

with extra("math", "lm-eval's task math500_verify"):
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """The score of one answer, as lm-eval's minerva_math grades it by math-verify.

    Args:
        doc: the document; its solution ends in the boxed answer.
        results: the completion.
    """
    return {"math_verify": int(verify(gold=parse(doc["solution"]), target=parse(results[0])))}
