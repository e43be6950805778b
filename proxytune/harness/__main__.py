"""lm-eval's own command line, with the model `proxytune`; see proxytune/harness/__init__.py."""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from proxytune.cli.guard import guarded

if __name__ == "__main__":
    model_registry.register("proxytune", target="proxytune.harness.model:ProxyTuneLM")
    guarded(cli_evaluate, again="lm-eval keeps answers with --use_cache only")
