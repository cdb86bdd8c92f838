#!/usr/bin/env bash
# Install what the tests need into .venv, check the style, and run all tests. --quick as the first word leaves out the
# tests that are marked slow, most of which start processes. Further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1-}" = --quick ]; then
    set -- -m 'not slow' "${@:2}"
fi
. scripts/venv.sh requirements.txt requirements-plot.txt requirements-test.txt
python -m ruff check .
# Two tests at a time, by files, whose fixtures are made once; one thread each, so that they do not wait for one another.
export OMP_NUM_THREADS=1
exec python -m pytest tests -n 2 --dist loadfile "$@"
