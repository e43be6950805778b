"""The completions of one system on one task: the prompts, and the file of answers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.errors import UserError
from proxytune.experiment.progress import CellProgress
from proxytune.files import JsonlWriter, read_jsonl
from proxytune.hashes import sha256_text
from proxytune.loading.prompting import encode, render
from proxytune.records import Completion, Example

if TYPE_CHECKING:  # they import transformers' models, and most refusals come before those
    from proxytune.engine.generation import Generation
    from proxytune.loading.loaded import LoadedModel

Stored = Mapping[str, Mapping[int, Completion]]  # example id -> sample -> completion


@dataclass(frozen=True)
class RenderedPrompt:
    """One example's prompt as the members of a system read it.

    Attributes:
        token_ids: role -> the ids that this member reads.
        sha256: role -> the hash of the text that this member reads.
        prefix: text that begins the answer after a thought.
    """

    token_ids: dict[str, list[int]]
    sha256: dict[str, str]
    prefix: str = ""


def render_prompts(
    examples: Sequence[Example], members: Mapping[str, "LoadedModel"]
) -> list[RenderedPrompt]:
    """Renders each example's prompt once for every member, in the member's own format.

    Args:
        examples: the examples to ask.
        members: role -> loaded model.

    Raises:
        UserError: a member wants a chat template and has none.
    """
    prompts = []
    for example in examples:
        texts = {role: render(example.prompt, m.format, m.tokenizer) for role, m in members.items()}
        prompts.append(
            RenderedPrompt(
                token_ids={role: encode(t, members[role].tokenizer) for role, t in texts.items()},
                sha256={role: sha256_text(t.text) for role, t in texts.items()},
                prefix="" if example.prompt.plain else example.prompt.response_prefix,
            )
        )
    return prompts


def read_completions(path: Path) -> Stored:
    """Reads completions.jsonl; a file that does not exist holds no completions.

    Raises:
        UserError: it is damaged, or two of its lines say different things of one sample.
    """
    found: dict[str, dict[int, Completion]] = defaultdict(dict)
    for completion in read_jsonl(path, Completion):
        samples, sample = found[completion.example_id], completion.sample
        if samples.setdefault(sample, completion) != completion:
            raise UserError(
                f"{path} has two different completions of example {completion.example_id!r}, "
                f"sample {sample}; delete the line that does not belong there"
            )
    return found


def lacks(stored: Stored, example: Example, samples: int) -> bool:
    """Whether one of an example's samples 0 to `samples` - 1 is not stored."""
    found = stored.get(example.id, {})
    return any(sample not in found for sample in range(samples))


class CompletionStore:
    """Appends each generation to completions.jsonl as soon as it ends, and counts it.

    Args:
        writer: open on the cell's completions.jsonl.
        examples: the examples that are asked, in the order of the prompts.
        prompts: [example], as the members read them.
        stored: the completions that an earlier session wrote; they are not written again.
        samples: completions per example.
        progress: the cell's progress bar.

    Attributes:
        tokens: tokens generated in this session.
    """

    def __init__(
        self,
        writer: JsonlWriter,
        examples: Sequence[Example],
        prompts: Sequence[RenderedPrompt],
        *,
        stored: Stored,
        samples: int,
        progress: CellProgress,
    ) -> None:
        self.tokens = 0
        self._writer = writer
        self._examples = examples
        self._prompts = prompts
        self._stored = stored
        self._unfinished = [samples] * len(examples)
        self._progress = progress

    def add(self, generation: "Generation") -> None:
        """Writes one generation and moves the progress bar.

        Raises:
            OSError: the disk is full; the completions written so far stay.
        """
        index = generation.prompt_index
        example = self._examples[index]
        if generation.sample not in self._stored.get(example.id, ()):
            self._writer.write(self._completion(generation, example))
        count = len(generation.token_ids)
        self.tokens += count
        self._progress.tokens(count)
        self._unfinished[index] -= 1
        if self._unfinished[index] == 0:
            self._progress.advance()

    def _completion(self, generation: "Generation", example: Example) -> Completion:
        return Completion(
            example_id=example.id,
            sample=generation.sample,
            text=generation.text,
            raw_text=generation.raw_text,
            token_ids=list(generation.token_ids),
            finish_reason=generation.finish_reason,
            prompt_sha256=self._prompts[generation.prompt_index].sha256,
            extra=generation.extra,
        )
