#!/usr/bin/env bash
# Sets up and runs the main job: a coordinator and five boroughs as separate processes on this machine calibrate one
# epidemic on real figures, without showing each other their data. Arguments go to `lpm federate`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
LPM_EXTRAS="${LPM_EXTRAS:-mpc,test}" bash scripts/setup.sh
exec .venv/bin/lpm federate simulations/nyc_boroughs --sharing crypten --control flower "$@"
