"""lm-eval's own command line, with the model `proxytune`; see proxytune/harness/__init__.py."""

from proxytune.cli.guard import guarded
from proxytune.errors import UserError, extra


def main() -> None:
    """Registers the model and hands over to lm-eval."""
    with extra("experiments", "lm-eval's command line"):
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        from proxytune.harness.evaluation import no_dataset

    model_registry.register("proxytune", target="proxytune.harness.model:ProxyTuneLM")
    try:
        cli_evaluate()
    except Exception as error:  # those of a dataset have many types, some of them RuntimeError
        refusal = no_dataset(error)
        if refusal is None:
            raise
        raise UserError(refusal) from error


if __name__ == "__main__":
    guarded(main, again="lm-eval keeps answers with --use_cache only")
