"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes.

It runs at every start of vLLM in an environment that has proxytune, so it imports nothing of ours,
and tells vLLM a name alone.
"""

# vLLM is in an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

ARCHITECTURE = "ProxyTunedForCausalLM"
KEY = "proxytune"  # of vLLM's `additional_config`, and of a request's `extra_args`


def register() -> None:
    """Makes the triple known to vLLM as an architecture; its module is imported when it is used."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"proxytune.vllm.model:{ARCHITECTURE}")
