"""Other vocabularies for tests: renamed, permuted, split; and slow references of their use."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import proxytune
from proxytune.loading.loaded import LoadedModel
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["Natalia sold", "Question: What", "def add(a"]
KINDS = ("pad_token", "bos_token", "eos_token")


def triple(arch: str = "llama", vocab: int = 300):
    hidden = 64 if arch == "gpt2" else 48
    base = tiny_model(arch, 1, hidden=hidden, layers=3)
    return [base, tiny_model(arch, 2, vocab=vocab), tiny_model(arch, 3, vocab=vocab)]


def loaded(members, tokenizers, **more):
    both = zip(members, tokenizers, strict=True)
    return proxytune.load(*(LoadedModel(*each) for each in both), alpha=0.7, **more)


def renamed_words(names):
    """The tiny tokenizer with other words; without merges, which would name the old ones."""
    spec = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocab = {names.get(word, word): i for word, i in spec["model"]["vocab"].items()}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.add_special_tokens({"eos_token": names.get("</s>", "</s>")})
    made.add_special_tokens({"pad_token": "<pad>", "bos_token": "<s>"})
    return made


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], None], **names: str) -> Any:
    """A copy of a fast tokenizer whose tokenizer.json a function has changed in place."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    core = Tokenizer.from_str(json.dumps(spec))
    own = {kind: word for kind in KINDS if (word := getattr(tokenizer, kind))}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **{**own, **names})
    made.chat_template = tokenizer.chat_template
    return made


def renamed(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """The tokenizer with other names for some added tokens: old -> new."""

    def rename(spec: dict[str, Any]) -> None:
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = {names.get(word, word): i for word, i in vocab.items()}
        processor = json.dumps(spec["post_processor"])
        for old, new in names.items():
            processor = processor.replace(json.dumps(old), json.dumps(new))
        spec["post_processor"] = json.loads(processor)

    own = {k: names.get(word, word) for k in KINDS if (word := getattr(tokenizer, k))}
    return changed(tokenizer, rename, **own)


def permutation(size: int) -> list[int]:
    """Old id -> new id."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()


def permuted(tokenizer: Any, new: Sequence[int]) -> Any:
    """The tokenizer with other ids: the token i is new[i]."""

    def permute(spec: dict[str, Any]) -> None:
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = {word: new[i] for word, i in vocab.items()}
        for token in spec["added_tokens"]:
            token["id"] = new[token["id"]]
        for each in ((spec["post_processor"] or {}).get("special_tokens") or {}).values():
            each["ids"] = [new[i] for i in each["ids"]]

    return changed(tokenizer, permute)


def permuted_model(model: Any, new: Sequence[int]) -> Any:
    """The model whose token new[i] is what token i was."""
    moved = copy.deepcopy(model)
    order = torch.tensor(new)
    heads = {id(m.weight): m for m in (moved.get_input_embeddings(), moved.get_output_embeddings())}
    with torch.no_grad():
        for head in heads.values():
            rows = head.weight.clone()
            head.weight[order] = rows[: len(order)]
    for config in (moved.config, moved.generation_config):
        config.eos_token_id = new[2]
        config.bos_token_id = new[1]
    return moved


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    """Writes both as from_pretrained expects them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_pocket(role: str, models: Path) -> tuple[Any, Any]:
    """A pocket model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(models / role, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(models / role)


# Other tokenizers of the pocket family: new id -> the old ids of the same text.
Rows = list[list[int]]


def finer(tokenizer: Any) -> tuple[Any, Rows]:
    """Numbers are written digit by digit."""
    words = _words(tokenizer)
    kept = {word: [i] for word, i in words.items() if not (word.strip().isdigit() and i > 9 + 3)}
    digits = {str(digit): [words[str(digit)]] for digit in range(10)}
    return _of(tokenizer, kept | digits, lambda pattern: pattern.replace("[0-9]+", "[0-9]"))


def coarser(tokenizer: Any) -> tuple[Any, Rows]:
    """`Question:`, `Answer:` and ` and the` are one word each; the others have other ids."""
    words = _words(tokenizer)
    merged = {
        "Question:": ["Question", ":"],
        "Answer:": ["Answer", ":"],
        " and the": [" and", " the"],
    }
    merged = {new: [words[part] for part in parts] for new, parts in merged.items()}
    special = {word: [i] for word, i in words.items() if i < 4}
    others = {word: [i] for word, i in reversed(words.items()) if i >= 4}
    return _of(
        tokenizer,
        special | merged | others,
        lambda pattern: "Question:|Answer:| and the(?![A-Za-z_])|" + pattern,
    )


def _words(tokenizer: Any) -> dict[str, int]:
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda each: each[1]))


def _of(
    tokenizer: Any, parts: Mapping[str, list[int]], pattern: Callable[[str], str]
) -> tuple[Any, Rows]:
    def change(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"] = {word: i for i, word in enumerate(parts)}
        split = spec["pre_tokenizer"]["pattern"]
        split["Regex"] = pattern(split["Regex"])

    return changed(tokenizer, change, unk_token="<unk>"), list(parts.values())


def resized(model: Any, rows: Rows) -> Any:
    """The model with other tokens: each has the mean of its old tokens' embeddings."""
    made = copy.deepcopy(model)
    old = model.get_input_embeddings().weight
    made.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        for head in (made.get_input_embeddings(), made.get_output_embeddings()):
            head.weight.copy_(torch.stack([old[ids].mean(0) for ids in rows]))
    return made.requires_grad_(False)
