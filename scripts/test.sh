#!/usr/bin/env bash
# Install what the tests need into .venv and run them all. Further words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh requirements.txt requirements-plot.txt requirements-test.txt
exec python -m pytest tests "$@"
