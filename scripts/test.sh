#!/usr/bin/env bash
# Install what the tests need into .venv, check the style, and run all tests. Further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh requirements.txt requirements-plot.txt requirements-test.txt
python -m ruff check .
exec python -m pytest tests "$@"
