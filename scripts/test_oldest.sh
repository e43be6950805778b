#!/usr/bin/env bash
# The engine's tests on the oldest transformers that pyproject.toml allows; SLOW=1 tries every
# family of models, too. That transformers goes in front of the environment's own (VENV, by default
# .venv), with the tokenizers and the hub client that it asks for; nothing is replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath "${VENV:-.venv}")/bin/python
folder=$(realpath "${VENV:-.venv}")/oldest
oldest=$(sed -nE 's/.*"transformers>=([0-9.]+)".*/\1/p' pyproject.toml)
[ -n "$oldest" ] || { echo "pyproject.toml names no oldest transformers"; exit 1; }
export PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ "$(cat "$folder/oldest" 2>/dev/null)" != "$oldest" ]; then
    rm -rf "$folder"
    into=("$python" -m pip install --quiet --upgrade --no-deps --target "$folder")
    "${into[@]}" "transformers==$oldest"
    own='s/^Requires-Dist: ((tokenizers|huggingface-hub)[^;]*)$/\1/p'
    mapfile -t needs < <(sed -nE "$own" "$folder"/transformers-*.dist-info/METADATA)
    "${into[@]}" "${needs[@]}"
    echo "$oldest" > "$folder/oldest"
fi

export PYTHONPATH=$folder OLDEST=$oldest
"$python" - <<'CHECK'
import os
import huggingface_hub
import tokenizers
import transformers

for module in (transformers, tokenizers, huggingface_hub):
    print(module.__name__, module.__version__, module.__file__)
    assert module.__file__.startswith(os.environ["PYTHONPATH"])
assert f"{transformers.__version__}.".startswith(f"{os.environ['OLDEST']}.")
CHECK

files=()
for name in api decode families graphs model packed prompting proxy speculative; do
    files+=("tests/test_$name.py")
done
markers="not gpu and not network"
[ -n "${SLOW:-}" ] || markers+=" and not slow"
"$python" -m pytest -n 2 --dist loadfile -m "$markers" "${files[@]}"
