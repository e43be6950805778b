"""Hydra config source `given://`: files that the command line names by their paths."""

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from proxytune.config.given import FILES


class GivenSource(ConfigSource):
    """Shows each file of `proxytune.config.given` as if it stood in its group's folder."""

    @staticmethod
    def scheme() -> str:
        """The word before :// in hydra.searchpath."""
        return "given"

    def available(self) -> bool:
        """Always: nothing is read."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether a file was given for this group."""
        path = config_path.strip("/")
        return any(name.startswith(f"{path}/") for name in FILES) if path else bool(FILES)

    def is_config(self, config_path: str) -> bool:
        """Whether it is one of the files."""
        return config_path.strip("/").removesuffix(".yaml") in FILES

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The names of a group's files."""
        if results_filter == ObjectType.GROUP:
            return []
        group = f"{config_path.strip('/')}/"
        return [name.removeprefix(group) for name in FILES if name.startswith(group)]

    def load_config(self, config_path: str) -> ConfigResult:
        """The file, with the header (`# @package _global_`) that Hydra reads in any file."""
        path = FILES[config_path.strip("/").removesuffix(".yaml")]
        header = self._get_header_dict(path.read_text(encoding="utf-8"))
        return ConfigResult(
            provider=self.provider, path=str(path), config=OmegaConf.load(path), header=header
        )
