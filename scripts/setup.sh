#!/usr/bin/env bash
# Makes .venv beside the project and installs lpm into it. Running it again changes nothing; it reinstalls only when
# pyproject.toml has changed. Sourced by run.sh and test.sh with the extras they need in LPM_EXTRAS.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="${LPM_EXTRAS:-mpc,test}"

python=""
for candidate in "${LPM_PYTHON:-}" python3.12 python3.11 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        # A wheel directory that serves one Python version alone decides for that version.
        if [ -n "${PIP_FIND_LINKS:-}" ] && [ -d "${PIP_FIND_LINKS%% *}" ]; then
            tag="$("$candidate" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
            ls "${PIP_FIND_LINKS%% *}"/torch-*.whl >/dev/null 2>&1 &&
                ! ls "${PIP_FIND_LINKS%% *}"/torch-*"$tag"*.whl >/dev/null 2>&1 && continue
        fi
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "lpm needs Python 3.11 or 3.12 on the PATH (or named by LPM_PYTHON)." >&2
    exit 1
fi

stamp="$root/.venv/.lpm-installed"
wanted="$(cat "$root/pyproject.toml" "$root/scripts/setup.sh" | cksum) $extras"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Setting up .venv (some minutes the first time) ..." >&2
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    venv="$root/.venv/bin/python"
    [ -n "${PIP_FIND_LINKS:-}" ] && export UV_FIND_LINKS="${PIP_FIND_LINKS// /,}"
    [ -n "${PIP_INDEX_URL:-}" ] && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    [ -n "${PIP_CERT:-}" ] && export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
    cd "$root"
    # The CPU build of torch comes from the wheel directory of this environment where there is one.
    if ! { "$venv" -m pip install --quiet uv && "$venv" -m uv pip install --quiet --python "$venv" -e ".[$extras]"; }; then
        echo "uv could not resolve the packages; trying pip." >&2
        "$venv" -m pip install --quiet -e ".[${extras#mpc,}]"
        "$venv" -m pip install --quiet omegaconf pyyaml
        "$venv" -m pip install --quiet --no-deps crypten==0.4.1
    fi
    # Compile the hot loops once, so that five institutions need not do so at the same time on their first run, and a
    # gradient audit does not wait for it.
    warm="$(mktemp -d)"
    for gradient in none alternates tangent; do
        OMP_NUM_THREADS=1 "$venv" -m lpm simulate simulations/three_clinics --steps 2 --gradient "$gradient" \
            --out "$warm/$gradient" --json >/dev/null
    done
    rm -rf "$warm"
    echo "$wanted" > "$stamp"
fi
