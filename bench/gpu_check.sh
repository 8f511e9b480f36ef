#!/usr/bin/env bash
# Everything that needs a GPU, in under six minutes, from a checkout as it is: nothing is installed, nothing downloaded.
#
#   bench/gpu_check.sh [--out FOLDER] [--seconds 340] [--dry-run] [--only PART,PART] [--keep-going]
#
# See bench/gpu_check.py, which does the work; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
