#!/usr/bin/env bash
# Gathers what the card's check needs on a machine that reaches nothing outside:  benchmarks/card/prepare.sh FOLDER
# FOLDER then holds the project's committed files and, in wheels/, the packages. Carry it there and run
# FOLDER/benchmarks/card/check.sh; that machine has a torch with CUDA, triton, transformers, accelerate and pytest.
set -euo pipefail

PACKAGES=(${PACKAGES:-peft==0.21.2})     # what it lacks, or has in another version; their own needs are not followed
PYTHON_VERSION=${PYTHON_VERSION:-3.12}   # of its interpreter, on Linux on x86-64
GLIBC=${GLIBC:-28}                       # its glibc is 2.GLIBC or newer
FILES=(src tests benchmarks/card pyproject.toml setup.cfg README.md)

folder=${1:?usage: prepare.sh FOLDER}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rm -rf "$folder"
mkdir -p "$folder/wheels"

platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for minor in $(seq "$GLIBC" -1 17); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$PYTHON_VERSION" "${platforms[@]}" --dest "$folder/wheels" "${PACKAGES[@]}"
git archive HEAD -- "${FILES[@]}" | tar -x -C "$folder"
du -sh "$folder"
