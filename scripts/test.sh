#!/usr/bin/env bash
# All checks: style, types, imports, tests. Arguments go to pytest, e.g. scripts/test.sh tests/test_golden.py -k eval.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh test

ruff check
ruff format --check --quiet
mypy
lint-imports --no-cache --no-logo
pytest "$@"
