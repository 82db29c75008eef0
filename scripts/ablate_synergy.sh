#!/usr/bin/env bash
# Does the tail rise while the head holds? From cross-entropy on a Linear head to LDAM + SupCon + RSG on NormedLinear.
#
#     bash scripts/ablate_synergy.sh data/digits --seeds 0 1 2 -- --arch resnet32 --epochs 30 --lr 0.05
#
# Flags, JOBS=2, Slurm, where things lie: bash scripts/ablate_synergy.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

# NormedLinear comes first: LDAM subtracts a margin in cosines, which does next to nothing on the unbounded logits of a
# Linear head, so SupCon + LDAM is judged on NormedLinear. Class weights come last: LDAM has ICF weights by default, and
# they alone would move the tail.
exec python scripts/sweep.py ablate_synergy '
    # each line changes one thing of the line before: the head, the losses, RSG, class weights
    ce                   --norm_out False --add_rsg False --add_ldam_loss False --add_supcon_loss False --add_cross_entropy_loss True
    ce_normed            --norm_out True  --add_rsg False --add_ldam_loss False --add_supcon_loss False --add_cross_entropy_loss True
    supcon_ldam          --norm_out True  --add_rsg False --add_ldam_loss True  --add_supcon_loss True  --ldam_weight_type none
    supcon_ldam_rsg      --norm_out True  --add_rsg True  --add_ldam_loss True  --add_supcon_loss True  --ldam_weight_type none
    supcon_ldam_rsg_icf  --norm_out True  --add_rsg True  --add_ldam_loss True  --add_supcon_loss True  --ldam_weight_type icf
    # without NormedLinear, to be held against supcon_ldam_rsg: what NormedLinear adds when all else is there
    supcon_ldam_rsg_linear --norm_out False --add_rsg True --add_ldam_loss True --add_supcon_loss True --ldam_weight_type none
' "$@"
