"""An adapter merged into its checkpoint, for vLLM.

vLLM's own LoRA acts on the layers of one model class that lists them; it has no place for the
adapter of a submodule, so an expert that adapts the antiexpert becomes a checkpoint of its own. A
base or a tuned model with an adapter is treated alike.
"""

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from proxytune.loading.load import load_member
from proxytune.vllm.plan import SystemPlan

log = logging.getLogger(__name__)


def with_merged(plan: SystemPlan) -> SystemPlan:
    """The plan with merged checkpoints in the place of adapters.

    They lie in the folder for temporary files as long as this process lives.

    Raises:
        UserError: an adapter cannot be found or read.
    """
    adapted = {role: spec for role, spec in plan.specs.items() if spec.adapter is not None}
    if not adapted:
        return plan
    paths = dict(plan.paths)
    specs = dict(plan.specs)
    for role, spec in adapted.items():
        folder = _new_folder()
        log.info("%s: merging %s into %s, for vLLM", role, spec.adapter, spec.id)
        loaded = load_member(replace(spec, device="cpu", dtype=plan.dtype))
        merged = loaded.model.merge_and_unload()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
        merged.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)  # pyright: ignore[reportOptionalMemberAccess]
        paths[role] = folder
        specs[role] = replace(spec, revision=None, adapter=None)
    return replace(plan, specs=specs, paths=paths)


def _new_folder() -> str:
    import atexit

    folder = tempfile.mkdtemp(prefix="proxytune-merged-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(Path(folder))
