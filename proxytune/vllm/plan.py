"""The members of one system as vLLM loads them: everything that is known without their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.engine.system import Facts
from proxytune.errors import UserError
from proxytune.loading.ends import end_ids, shared_end
from proxytune.loading.load import generation_configs, load_config, load_tokenizer
from proxytune.loading.loaded import LoadedModel
from proxytune.loading.spec import ModelSpec
from proxytune.loading.vocabulary import common_vocabulary
from proxytune.members.facts import positions_of
from proxytune.proxy import SharedEnd
from proxytune.vllm.settings import EngineSettings

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(eq=False)
class EngineModel(LoadedModel):
    """A model that an engine of somebody else's has in memory.

    Attributes:
        configs: its configuration, and its generation configuration if it has one.
    """

    configs: tuple[Any, ...] = ()

    @property
    def output_size(self) -> int:
        """How many entries its logits have."""
        return self.configs[0].get_text_config().vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a completion, by the configurations and the tokenizer."""
        return end_ids(self.tokenizer, *self.configs)


@dataclass(frozen=True)
class SystemPlan:
    """A system before it is loaded.

    Attributes:
        specs: role -> where the model comes from; "base" alone, or a triple.
        models: role -> tokenizer and configurations.
        paths: role -> the checkpoint that vLLM reads.
        vocab_size: entries of the logits that count.
        end: see `SharedEnd`.
        dtype: of every member.
        alpha: scale on (expert - antiexpert).
    """

    specs: Mapping[str, ModelSpec]
    models: Mapping[str, EngineModel]
    paths: Mapping[str, str]
    vocab_size: int
    end: SharedEnd | None
    dtype: str
    alpha: float

    @property
    def alphas(self) -> dict[str, float]:
        """The formula's alphas by their names, as `Generator` has them."""
        return {"alpha": self.alpha} if len(self.specs) > 1 else {}

    @property
    def facts(self) -> dict[str, Facts]:
        """Role -> what the generator knows of the model."""
        return {role: self._fact(model) for role, model in self.models.items()}

    def _fact(self, model: EngineModel) -> Facts:
        facts = Facts()
        facts.vocab_size = self.vocab_size
        facts.max_positions = positions_of(model.configs[0])
        return facts

    @property
    def composed(self) -> bool:
        """Whether our model class is needed: for a triple, or to cut a padded vocabulary."""
        return len(self.models) > 1 or self.vocab_size < self.models["base"].output_size

    def positions(self, wanted: int | None = None) -> int:
        """The longest row in tokens: what every member reads, or less where that is wanted.

        Raises:
            UserError: more is wanted, or no member names a limit.
        """
        limits = {role: each.max_positions for role, each in self.facts.items()}
        known = {role: limit for role, limit in limits.items() if limit}
        if not known and wanted is None:
            raise UserError("no member names its longest row; give engine.max_model_len")
        shortest = min(known, key=lambda role: known[role], default=None)
        if shortest is not None and wanted is not None and wanted > known[shortest]:
            raise UserError(
                f"engine.max_model_len={wanted}: the {shortest} reads at most {known[shortest]} "
                "tokens"
            )
        return wanted or min(known.values())

    def described(self) -> dict[str, Any]:
        """What `model.ProxyTunedForCausalLM` is told, besides `vocab_size`."""
        helpers = {
            role: {"id": self.paths[role], "revision": self.specs[role].revision}
            for role in self.specs
            if role != "base"
        }
        architectures = list(self.models["base"].configs[0].architectures or [])
        given: dict[str, Any] = {"architectures": architectures, **helpers}
        if helpers:
            given["alpha"] = self.alpha
        if self.end is not None:
            given["end"] = self.end.to_dict()
        return given

    def speculative(self, settings: EngineSettings) -> dict[str, Any] | None:
        """vLLM's configuration of speculation; None where nothing drafts."""
        count = settings.speculative_tokens
        if settings.speculative == "ngram":
            return {"method": "ngram", "num_speculative_tokens": count, "prompt_lookup_max": count}
        if settings.speculative == "draft_model" and "expert" in self.paths:
            path = self.paths["expert"]
            return {"method": "draft_model", "model": path, "num_speculative_tokens": count}
        return None


def make_plan(specs: Mapping[str, ModelSpec], alpha: float = 1.0) -> SystemPlan:
    """The plan of a system whose models `check_triple` has accepted.

    Raises:
        UserError: the members have several dtypes, or the vocabularies differ.
    """
    models = {role: _model(role, spec) for role, spec in specs.items()}
    tokenizers = {role: model.tokenizer for role, model in models.items()}
    sizes = {role: model.output_size for role, model in models.items()}
    ends = {role: model.eos_ids for role, model in models.items()}
    vocab_size = common_vocabulary(tokenizers, sizes)
    end = shared_end(ends, sizes, tokenizers["base"], vocab_size) if len(specs) > 1 else None
    return SystemPlan(
        specs=specs,
        models=models,
        paths={role: spec.id for role, spec in specs.items()},
        vocab_size=vocab_size,
        end=end,
        dtype=_one_dtype(models),
        alpha=alpha,
    )


def _model(role: str, spec: ModelSpec) -> EngineModel:
    configs = (load_config(role, spec), *generation_configs(spec))
    return EngineModel(None, load_tokenizer(spec, role), spec, configs=configs)


def _one_dtype(models: Mapping[str, EngineModel]) -> str:
    """The dtype of all members.

    Raises:
        UserError: they have several, or a checkpoint names none.
    """
    dtypes: dict[str, str] = {}
    for role, model in models.items():
        assert model.spec is not None
        own = model.configs[0].get_text_config().dtype
        dtypes[role] = model.spec.dtype
        if model.spec.dtype == "auto":
            dtypes[role] = str(own).removeprefix("torch.")
        if dtypes[role] not in _DTYPES:
            raise UserError(f"{role}: {model.spec.id} names no dtype; give one (dtype: float32)")
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{role} {dtype}" for role, dtype in dtypes.items())
        raise UserError(
            f"vLLM runs all members in one dtype, and they have several ({listed}); give each the "
            "same (triple.expert.dtype=...)"
        )
    return dtypes["base"]
