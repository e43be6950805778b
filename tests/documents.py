"""What the documents print for a reader to type: commands, settings, and whole snippets."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proxytune.files import ROOT

PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?"
    r"(?:python|make|proxytune|pytest|accelerate|lm_eval|pip|vllm|hf|git|curl|wandb|run\.py"
    r"|scripts/\S+\.(?:py|sh))(?: (?! )|$)"
)
SETTING = re.compile(r"(?:-m )?(?:[+~]*\.?[\w./@-]+=\S+ ?)+")


@dataclass(frozen=True)
class Snippet:
    """One thing that a document prints.

    Attributes:
        document: the file's name.
        kind: "command", "setting" (`task=capitals`), "block" (what no program begins: a table, an
            output), or a fence's language.
        text: as printed, without comments after commands; lines that belong together are joined.
        output: the block right after a fence, where there is one.
    """

    document: str
    kind: str
    text: str
    output: str = ""

    @property
    def name(self) -> str:
        """What it is known by: in a test's name, and to the rules' patterns."""
        return f"{self.document}: {' '.join(self.text.split())}"


def snippets(path: Path) -> list[Snippet]:
    """Everything that a document prints, each once."""
    return list(dict.fromkeys(_snippets(path)))


def _snippets(path: Path) -> Iterator[Snippet]:
    prose, parts = [], list(_parts(path.read_text(encoding="utf-8").splitlines()))
    for number, (kind, text) in enumerate(parts):
        before, (after, output) = parts[number - 1][0], (*parts, ("", ""))[number + 1]
        if kind == "prose":
            prose.append(text)
        elif kind == "block" and before not in ("prose", "block"):
            continue  # what the fence before it prints
        elif kind in ("", "block") and PROGRAM.match(_without_comments(text)):
            for command in _commands(text):
                yield Snippet(path.name, "command", command)
        elif kind in ("", "block"):
            yield Snippet(path.name, "block", text)
        else:
            yield Snippet(path.name, kind, text, output if after == "block" else "")
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", " ".join("\n".join(prose).split())):
        if PROGRAM.match(span) and (" " in span or "/" in span):
            yield Snippet(path.name, "command", span)
        elif SETTING.fullmatch(span):
            yield Snippet(path.name, "setting", span)


def _parts(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Fences by language, indented blocks, and the prose between them."""
    kind, found = "prose", []
    for line in [*lines, "```"]:
        fence, indented = line.startswith("```"), line.startswith("    ")
        inside = kind not in ("prose", "block")
        if inside and not fence:
            found.append(line)
            continue
        begins = kind == "prose" and indented and not "".join(found[-1:]).strip()
        ends = kind == "block" and line.strip() and not indented
        if fence or begins or ends:
            if "".join(found).strip():
                yield kind, "\n".join(found).strip("\n")
            found = []
            kind = "prose" if inside or ends else "block"
            if fence and not inside:
                kind = line.removeprefix("```")
        if not fence:
            found.append(line[4:] if kind == "block" else line)


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))


def _commands(text: str) -> Iterator[str]:
    """The commands of a block: a backslash or an open quote joins the next line."""
    command = ""
    for line in _without_comments(text).splitlines():
        command += line
        if command.endswith("\\"):
            command = command.removesuffix("\\").rstrip() + " "
            continue
        try:
            shlex.split(command, comments=True)
        except ValueError:  # an open quote
            command += "\n"
            continue
        yield re.sub(r"\s+#\s[^\n]*", "", command)
        command = ""


# docs/log.md is history: its commands were true on their day
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [s for path in DOCUMENTS if path.name != "log.md" for s in snippets(path)]
