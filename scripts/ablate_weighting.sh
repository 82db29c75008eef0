#!/usr/bin/env bash
# How much should rare classes weigh? LDAM + SupCon on NormedLinear (the defaults, but without RSG), with class weights
# from none to inverse class frequency, and deferred (DRW).
#
#     bash scripts/ablate_weighting.sh data/digits --seeds 0 1 2 -- --arch resnet32 --epochs 30 --lr 0.05
#
# Flags, JOBS=2, Slurm, where things lie: bash scripts/ablate_weighting.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

exec python scripts/sweep.py ablate_weighting '
    none       --add_rsg False --ldam_weight_type none
    # class-balanced, by effective numbers (Cui et al., 2019): the larger beta, the closer to ICF
    cb_0.9     --add_rsg False --ldam_weight_type cbl --cbl_beta 0.9
    cb_0.99    --add_rsg False --ldam_weight_type cbl --cbl_beta 0.99
    cb_0.999   --add_rsg False --ldam_weight_type cbl --cbl_beta 0.999
    cb_0.9999  --add_rsg False --ldam_weight_type cbl --cbl_beta 0.9999
    # inverse class frequency
    icf        --add_rsg False --ldam_weight_type icf
    # deferred to the last fifth of the epochs, with the weights of Cao et al., 2019, and with ICF
    drw_cb     --add_rsg False --ldam_weight_type cbl --cbl_beta 0.9999 --drw_epoch 0.8
    drw_icf    --add_rsg False --ldam_weight_type icf --drw_epoch 0.8
' "$@"
