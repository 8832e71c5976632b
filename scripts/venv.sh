# Sourced by the other scripts, from the project's root: make and enter .venv with the extras named in the arguments.
# Uses uv where it is installed, else venv and pip. Does nothing when all is in place already.

_extras=$(IFS=,; echo "$*")
_alone="scripts/reasoning-gym.txt scripts/tritonclient.txt" # without what they ask for
_wanted="$_extras $(cat pyproject.toml $_alone | cksum)"
_stamp=".venv/installed-$_extras"

if command -v uv > /dev/null; then
    _make_venv() { uv venv --quiet --python '>=3.11' .venv; }
    _install() { uv pip install --quiet --python .venv/bin/python -e "$1"; }
    _install_plain() { uv pip install --quiet --python .venv/bin/python --no-deps -r "$1"; }
    # uv does not read pip's settings: where a machine has a folder of wheels for pip, let uv look there too.
    export UV_FIND_LINKS=${UV_FIND_LINKS-${PIP_FIND_LINKS-}}
else
    _make_venv() { "$_python" -m venv .venv; }
    _install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$1"; }
    _install_plain() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r "$1"; }
    for _python in python3 python3.13 python3.12 python3.11 ""; do
        [ -n "$_python" ] || { echo "error: Python 3.11 or later is needed, and not on the PATH; install it, or uv." >&2; exit 2; }
        "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break
    done
fi

[ -x .venv/bin/python ] || { echo "Making .venv"; _make_venv; }
if [ "$(cat "$_stamp" 2> /dev/null)" != "$_wanted" ]; then
    if [ "$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null && ! .venv/bin/python -c 'import torch' 2> /dev/null; then
        echo "No NVIDIA GPU is seen: README.md, \"Set up\", names a way around the several GB of libraries for one."
    fi
    echo "Installing hrm[$_extras] into .venv (the first time, a minute or more: PyTorch is large)"
    _install ".[$_extras]"
    case ",$_extras," in
        *,test,*)
            for _file in $_alone; do
                _install_plain $_file || echo "note: $_file cannot be installed here (see above): its tests are skipped." >&2
            done
            ;;
    esac
    echo "$_wanted" > "$_stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
