"""A cell's identity (cell.json): everything that its completions depend on, and nothing else.

A results folder is resumed only where the identities agree, and by one process at a time.
"""

import copy
import dataclasses
import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from proxytune import provenance
from proxytune.config.formulas import (
    alphas,
    formula_identity,
    is_default,
    member_of,
    members_of,
)
from proxytune.config.schema import to_dict
from proxytune.config.specs import engine_settings
from proxytune.errors import UserError
from proxytune.files import open_own, read_json, write_json
from proxytune.hashes import FACTS
from proxytune.records import Decoding

log = logging.getLogger(__name__)

_FINISHED = ("completions.jsonl", "result.json")  # a cell's finished work
_API_IDENTITY = ("model", "top_logprobs", "endpoint", "foreign_tokenizer")

# Settings of `Decoding` that the identities of older folders lack; the defaults change nothing.
_ADDED = (
    *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"),
    *("think_budget", "think_least", "think_word"),
)


def system_identity(cfg: DictConfig, system: str) -> dict[str, Any]:
    """Everything of a system that its completions depend on, and nothing else.

    The device, the batch size, the decoding strategy and the limit are left out: they change
    which completions are made first, not their text.
    """
    members = {}
    for role, name in members_of(cfg, system).items():
        node = member_of(cfg, name)
        assert node is not None  # `check_before_models` has seen to it
        member = to_dict(node)
        del member["device"], member["max_memory"]
        member["quantization"] = member["quantization"] or None  # {} is none, too
        member |= provenance.model_facts(member)
        for key in ("id", "adapter"):  # a local folder may move: its weights' hash identifies it
            if member[key] and (Path(member[key]).is_dir() or Path(member[key]).is_absolute()):
                member[key] = Path(member[key]).name
        if member["api"]:  # its address and its prices change no answer
            member["api"] = {key: member["api"][key] for key in _API_IDENTITY}
        for key in ("template_kwargs", "think_start", "think_end"):  # older folders lack them
            if not member["format"][key]:
                del member["format"][key]
        members[role] = member
    identity: dict[str, Any] = {"system": system, "members": members}
    if system == "proxy":
        identity |= {"alpha": alphas(cfg), "trace": cfg.decoding.trace}
        if cfg.triple.vocabulary != "strict":  # older folders do not name it
            identity["vocabulary"] = cfg.triple.vocabulary
        if not is_default(cfg):  # folders of the default formula do not name it
            identity["formula"] = formula_identity(cfg)
    return identity | engine_settings(cfg).identity()


def decoding_identity(decoding: Decoding, seed: int) -> dict[str, Any]:
    """The settings that a completion depends on; a greedy one depends on no seed.

    Settings that were added later are left out where they change nothing: so a folder made before
    them is resumed.
    """
    identity = json.loads(json.dumps(dataclasses.asdict(decoding)))
    for name in _ADDED:
        if identity[name] == getattr(Decoding, name):
            del identity[name]
    return identity | ({"seed": seed} if decoding.temperature > 0 else {})


def claim(folder: Path, identity: dict[str, Any], stage: str) -> None:
    """Takes a cell's folder, or refuses it when it holds another configuration's completions.

    Args:
        folder: of one system on one task; it gets cell.json, unless that is there already.
        identity: see `system_identity` and `decoding_identity`.
        stage: "score" makes no new folder.

    Raises:
        UserError: the folder's completions were made with another identity or an unknown one, or
            stage is "score" and there are none; nothing was changed.
    """
    path = folder / "cell.json"
    if path.exists():
        changed = provenance.differences(*_comparable(_stored(path), identity))
        if changed:
            raise UserError(
                f"{folder} holds completions of another configuration ({'; '.join(changed)}); "
                "choose another folder with output_dir=..., or delete this one"
            )
        return
    kept = next((each for each in map(folder.joinpath, _FINISHED) if each.exists()), None)
    if kept is not None:
        raise UserError(
            f"{kept} has no cell.json beside it, so nobody knows which configuration wrote it; "
            "restore cell.json, or move the folder away"
        )
    if stage == "score":
        raise UserError(f"{folder} holds no completions to score; run with stage=all first")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def is_made_alike(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a cell's folder holds completions with this identity; of a damaged one, it does not.

    Args:
        folder: of one system on one task; it may be missing.
        identity: see `claim`.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return False
    try:
        stored = _stored(path)
    except UserError as error:
        log.warning("%s; nothing is copied from there", error)
        return False
    return not provenance.differences(*_comparable(stored, identity))


def _stored(path: Path) -> dict[str, Any]:
    """The identity in a cell.json.

    Raises:
        UserError: it is damaged.
    """
    stored = read_json(path, members=dict, system=str)
    if not all(isinstance(member, dict) for member in stored["members"].values()):
        raise UserError(f"{path} is damaged (a member is no object); restore it, or delete it")
    return stored


def _comparable(
    stored: dict[str, Any], identity: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities without the facts of their models that only one of them knows.

    Scoring needs no model, so it may be done on a machine that does not have them.
    """
    one, other = copy.deepcopy(stored), copy.deepcopy(identity)
    engines = [each["engine"] for each in (one, other) if isinstance(each.get("engine"), dict)]
    if not all(engine.get("version") for engine in engines):
        for engine in engines:
            engine.pop("version", None)
    for role in one["members"].keys() & other["members"].keys():
        pair = one["members"][role], other["members"][role]
        for fact, name in FACTS.items():
            known = [member.get(fact) is not None for member in pair]
            # If both recorded the resolved commit, ignore the branch or tag it came from.
            unused = name if all(known) else fact
            for member in pair:
                member.pop(unused, None)
    return one, other


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from generating into a results folder while the block runs.

    The operating system frees the lock of a process that is killed.

    Raises:
        UserError: another process is generating into it.
    """
    with open_own(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is generating into {folder}; wait for it, or choose another "
                "folder with output_dir=..."
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        yield
