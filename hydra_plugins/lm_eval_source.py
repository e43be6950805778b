"""Hydra config source `lm-eval://`: `task=[lm_eval/arc_easy]` composes without a file.

Every name in task/lm_eval is accepted as a configuration. The run checks later whether lm-eval
knows the task (tasks/lm_eval_task.py), because lm-eval takes seconds to read its index. The entry's
key has no slash, so that the command line can change it: task.lm_eval_arc_easy.num_fewshot=5.
"""

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

_GROUP = "task/lm_eval"


class LmEvalSource(ConfigSource):
    """Composes conf/task/lm_eval/NAME.yaml, which is no file, for any NAME."""

    @staticmethod
    def scheme() -> str:
        """The part before :// in hydra.searchpath."""
        return "lm-eval"

    def available(self) -> bool:
        """True: this source reads nothing."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether a path is one of the folders above the tasks."""
        return config_path.strip("/") in ("", "task", _GROUP)

    def is_config(self, config_path: str) -> bool:
        """Whether a path is a task in task/lm_eval."""
        folder, _, name = config_path.strip("/").removesuffix(".yaml").rpartition("/")
        return folder == _GROUP and bool(name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The folders alone; the tasks are too many to list after a misspelt name."""
        inside = {"": ["task"], "task": ["lm_eval"]}.get(config_path.strip("/"), [])
        return [] if results_filter == ObjectType.CONFIG else inside

    def load_config(self, config_path: str) -> ConfigResult:
        """The entry of one task; its settings are lm-eval's defaults."""
        name = config_path.removesuffix(".yaml").rpartition("/")[2]
        entry = {
            "_target_": "tasks.lm_eval_task.LmEvalTask",
            "task": name,
            "num_fewshot": None,
            "apply_chat_template": False,
            "gen_kwargs": None,
            "include_path": None,
            "run_code": False,
        }
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create({f"lm_eval_{name}": entry}),
            header={"package": "task"},
        )
