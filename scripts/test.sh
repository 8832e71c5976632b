#!/usr/bin/env bash
# All checks: style, types, imports, tests. Arguments go to pytest, which runs two files of tests at a time:
#   scripts/test.sh -m "not slow"                     the fast ones, in two minutes
#   scripts/test.sh -n 0 tests/models -k golden       one at a time
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh test

ruff check
ruff format --check --quiet
mypy
lint-imports --no-cache --no-logo
pytest --numprocesses=2 --dist=loadfile "$@"
