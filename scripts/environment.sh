# Sourced with a requirements file: makes .venv if there is none, installs what it lacks, and puts it on PATH.
# Runs from the repository root; a second time it only compares a checksum.

requirements=$1
if [ ! -x .venv/bin/python ]; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || { echo "error: Python 3.11 or newer is needed; none found on PATH" >&2; exit 2; }
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
PATH="$PWD/.venv/bin:$PATH"
checksum=$(cat requirements*.txt | cksum | tr ' ' -)
installed=.venv/installed-$(basename "$requirements")-$checksum
if [ ! -e "$installed" ]; then
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null 2>&1 || {
        echo "error: .venv has no pip; remove it, on Debian or Ubuntu install python3-venv, and try again" >&2
        exit 2
    }
    echo "installing $requirements (about 5 GB, a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$installed"
fi
