#!/usr/bin/env bash
# Install into a virtual environment of its own and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-test}
. scripts/environment.sh
make_environment "[test,bench]"
# One thread a process: the models are tiny, and threads of several processes only get in each
# other's way.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$VENV/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist worksteal "$@"
