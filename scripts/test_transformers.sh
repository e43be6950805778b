#!/usr/bin/env bash
# The engine's tests on other releases of transformers than the pinned one: `oldest` is the one that
# pyproject.toml allows, `newest` the last one released, and a number is that release. SLOW=1 tries
# every family of models, too. The release goes in front of the environment's own (VENV, by default
# .venv), with the tokenizers and the hub client that it asks for; nothing is replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${VENV:-.venv}")
export PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
markers="not gpu and not network"
[ -n "${SLOW:-}" ] || markers+=" and not slow"
files=()
for name in api decode families graphs model packed prompting proxy speculative; do
    files+=("tests/test_$name.py")
done

[ $# -gt 0 ] || set -- oldest newest
for release; do
    wanted=transformers
    case $release in
        oldest) wanted=$(sed -nE 's/.*"transformers>=([0-9.]+)".*/transformers==\1/p' pyproject.toml) ;;
        newest) ;;
        *) wanted="transformers==$release" ;;
    esac
    folder=$venv/transformers-$release
    rm -rf "$folder"
    into=("$venv/bin/python" -m pip install --quiet --upgrade --no-deps --target "$folder")
    "${into[@]}" "$wanted"
    own='s/^Requires-Dist: ((tokenizers|huggingface-hub)[^;]*)$/\1/p'
    mapfile -t needs < <(sed -nE "$own" "$folder"/transformers-*.dist-info/METADATA)
    "${into[@]}" "${needs[@]}"
    PYTHONPATH=$folder "$venv/bin/python" - "$folder" <<'CHECK'
import sys

import huggingface_hub
import tokenizers
import transformers

for module in (transformers, tokenizers, huggingface_hub):
    print(module.__name__, module.__version__, module.__file__)
    assert module.__file__.startswith(sys.argv[1])
CHECK
    PYTHONPATH=$folder "$venv/bin/python" -m pytest -n 2 --dist worksteal -m "$markers" "${files[@]}"
done
