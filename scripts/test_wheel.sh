#!/usr/bin/env bash
# Run the service's tests on the newest wheel in a folder, from a folder where nothing else is.
#
#   scripts/test_wheel.sh PYTHON FOLDER [PYTEST-ARGS...]
#
# Left out are tests that look inside: they derive from compiled classes, or replace methods or
# constants there, which has no effect or is not allowed; and the fleet simulator's, whose requests
# and clocks the compiled router does not take (`xllm bench fleet` says so).
set -euo pipefail

python=$(realpath --no-symlinks "$1")
wheel=$(ls -t "$2"/xllm_plugin-*-cp*.whl | head -n 1)
shift 2
cd "$(dirname "$0")/.."
wheel=$(realpath "$wheel")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m zipfile -e "$wheel" "$place"
cp -r tests benchmarks docs scripts pyproject.toml README.md CHANGELOG.md Makefile "$place"
cd "$place"
PYTHONPATH=$place "$python" -c '
import xllm_plugin.service.exchange as exchange
assert exchange.__file__.endswith(".so"), exchange.__file__
'
PYTHONPATH=$place "$python" -m pytest -p no:cacheprovider -m "not looks_inside" "$@" tests/service
