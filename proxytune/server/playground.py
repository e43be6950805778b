"""The playground: a page at / that shows a triple's systems side by side.

The page itself holds no text of the server's. What it shows comes from the API of the same server,
so an API key guards it.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from starlette.responses import HTMLResponse, Response

from proxytune.errors import UserError
from proxytune.formula import SHIPPED, shipped
from proxytune.generator import Generator
from proxytune.loading.formulas import name_of
from proxytune.results.templates import HEADERS, asset, render


@dataclass(frozen=True)
class Suggestion:
    """A prompt that the page offers.

    Attributes:
        label: what it is called.
        form: "chat", a turn that each member reads in its own format, or "text", the same text for
            every member.
        prompt: the turn, or the text.
        prefix: what the answer begins with.
        system: the system turn; None for none.
        max_tokens: the longest answer.
        stop: strings that end the answer.
    """

    label: str
    form: Literal["chat", "text"]
    prompt: str
    prefix: str = ""
    system: str | None = None
    max_tokens: int = 64
    stop: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Playground:
    """What the page is told besides the API.

    Attributes:
        about: one line about the models.
        systems: system -> the model's name in the API, in the order of the page.
        suggestions: prompts to begin with.
    """

    about: str
    systems: dict[str, str]
    suggestions: list[Suggestion] = field(default_factory=list)

    def to_dict(self, proxy: Generator) -> dict[str, Any]:
        """For JSON; `proxy` is the system that the page explains."""
        return {
            "about": self.about,
            "systems": [{"system": each, "model": name} for each, name in self.systems.items()],
            "members": proxy.shows_members,
            "formula": name_of(proxy.formula) if proxy.formula else None,
            "formulas": _formulas(proxy),
            "alphas": {
                name if name == "alpha" else name.removesuffix("_alpha"): value
                for name, value in proxy.alphas.items()
            },
            "ends": sorted(proxy.eos_ids),
            "examples": [asdict(each) for each in self.suggestions],
        }


def _formulas(proxy: Generator) -> list[dict[str, Any]]:
    """The formulas that the page can ask for in place of the server's, and their settings."""
    found = []
    for name, (_, settings) in SHIPPED.items():
        try:
            own = proxy.combination(shipped(name))
        except UserError:
            continue  # it combines other models
        if own is not None and own.formula is not proxy.formula:
            found.append({"name": name, "settings": dict(settings)})
    return found


def page() -> Response:
    """The page."""
    text = render(
        "playground.html",
        title="proxytune playground",
        css=asset("page.css") + asset("playground.css"),
        js=asset("page.js") + asset("playground.js"),
    )
    return HTMLResponse(text, headers=HEADERS)
