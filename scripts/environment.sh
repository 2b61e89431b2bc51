# Sourced by quickstart.sh and test.sh: make a virtual environment in $VENV and install into it.
# PYTHON (default python3) makes it; TORCH names the torch packages to install first.

make_environment() {
    local extras=$1
    PYTHON=${PYTHON:-python3}
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "vlmtune needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2
        exit 2
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        echo "making $VENV"
        "$PYTHON" -m venv "$VENV"
    fi
    # torch and torchvision as a pair first: chosen apart, they may not fit together.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        ${TORCH:-torch==2.14.1 torchvision==0.29.1}
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
}
