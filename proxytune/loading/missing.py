"""What is said about a model, tokenizer or adapter that cannot be had."""

from pathlib import Path


def not_found(role: str, name: str, what: str, error: BaseException) -> str:
    """One line that names the missing file and the way out.

    Args:
        role: of the model.
        name: a hub id or a folder.
        what: the missing part ("tokenizer", "weights", ...).
        error: the error of transformers or PEFT.
    """
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file() and what == "config.json":
        return (
            f"{role}: the folder {name} holds an adapter, not a model; its model goes into "
            f"triple.{role}.id, and the adapter into triple.{role}.adapter={name}"
        )
    if path.is_dir():
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{role}: the folder {name} has no usable {what} ({detail})"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{role}: there is no folder {name}; give the path of a model or a hub id"
    text = str(error).lower()
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{role}: {name} is gated on the hub: accept its terms on "
            f"https://huggingface.co/{name} and log in (`hf auth login`, or HF_TOKEN)"
        )
    return (
        f"{role}: {name} is neither a local folder nor a model that can be had from the hub "
        f"({what}); check the name, the network and HF_HUB_OFFLINE, or log in for private models"
    )
