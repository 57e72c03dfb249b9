#!/usr/bin/env bash
# On the machine with the card: installs the wheels beside it, and runs check.py with the arguments given.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$root/wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/wheels/*.whl
fi
# Triton keeps what it compiles; a fresh folder, so that every run compiles what it runs.
export PYTHONPATH=$site:$root/src TRITON_CACHE_DIR=$site/triton HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
"$python" "$root/benchmarks/card/check.py" "$@"
