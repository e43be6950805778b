"""Hashes of values and texts, by which runs, models and datasets are recognised."""

import hashlib
import json
from typing import Any

# Fact by which a model is recognised (`provenance.model_facts`) -> the setting that it makes
# redundant, if there is one.
FACTS = {
    "weights": None,
    "commit": "revision",
    "adapter_weights": None,
    "adapter_commit": "adapter_revision",
    "chat_template_sha256": None,
}


def sha256_json(value: Any) -> str:
    """The SHA-256 of a JSON value in one canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_text(text: str) -> str:
    """The SHA-256 of a text, which may hold lone surrogates, as some datasets do."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
