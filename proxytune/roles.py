"""The systems of a comparison, and the models that each of them uses."""

import re

from proxytune.errors import UserError

SYSTEMS = ("base", "expert", "antiexpert", "proxy", "tuned")  # in the order of a table's columns
COMPARED = ("base", "expert", "proxy", "tuned")  # the rows of the paper's tables
ROLES = ("base", "expert", "antiexpert", "tuned")  # the models that a file of conf/triple names

# system -> {the engine's role: the triple's model}. A single model is a base without helpers.
MEMBERS = {
    "base": {"base": "base"},
    "expert": {"base": "expert"},
    "antiexpert": {"base": "antiexpert"},
    "tuned": {"base": "tuned"},
    "proxy": {"base": "base", "expert": "expert", "antiexpert": "antiexpert"},
}
# The order of running: neighbours share models, so that at most the triple is in memory.
ORDER = ("expert", "antiexpert", "base", "proxy", "tuned")


def check_pair(name: str) -> None:
    """Refuses a pair's name that cannot be a part of its roles' names.

    Raises:
        UserError: it has other characters than small letters and digits.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise UserError(f"a pair's name has small letters and digits: {name!r}")


def pair_of(role: str) -> str:
    """What the names of a pair's roles begin with: "" for expert, "math_" for math_expert."""
    return role.removesuffix("expert").removesuffix("anti")
