#!/usr/bin/env bash
# Checks the style and runs the tests; extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-test.txt

ruff check .
ruff format --check .
python -m pytest -n auto --dist worksteal "$@"
