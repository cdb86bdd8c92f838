# Sourced with the current folder at the project's root: make or reuse .venv, and install the named requirements.
# Nothing is installed when the same requirements were installed before.
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo 'error: Python 3.10 or newer is needed; name one in PYTHON' >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv .venv
fi
wanted=$(cat "$@" | cksum)
if [ "$(cat .venv/.installed-"$(basename "${!#}")" 2>/dev/null)" != "$wanted" ]; then
    echo '--- installing into .venv (torch is large: minutes the first time)'
    .venv/bin/python -m pip install -q --disable-pip-version-check $(printf -- '-r %s ' "$@")
    echo "$wanted" > .venv/.installed-"$(basename "${!#}")"
fi
. .venv/bin/activate
# Threads that spin while they wait for each other gain a quarter on idle cores, and crawl where other programs use
# them: three to five times slower seen. OMP_WAIT_POLICY=active spins.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
