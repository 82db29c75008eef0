#!/usr/bin/env bash
# What does the Rare-class Sample Generator give, how much of it, and from when on? The defaults, and one flag changed.
#
#     bash scripts/ablate_rsg.sh data/digits --seeds 0 1 2 -- --arch resnet32 --epochs 30 --lr 0.05
#
# Flags, JOBS=2, Slurm, where things lie: bash scripts/ablate_rsg.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

exec python scripts/sweep.py ablate_rsg '
    off               --add_rsg False
    on                --add_rsg True
    # how many rows are generated
    strength_0.5      --add_rsg True --rsg_strength 0.5
    strength_2        --add_rsg True --rsg_strength 2
    # from when on; the default is the last fifth of the epochs
    from_the_start    --add_rsg True --epoch_thresh -1
    from_half         --add_rsg True --epoch_thresh 0.5
    # generated rows in SupCon: keys only, or left out; the default is anchors and keys
    supcon_keys       --add_rsg True --supcon_generated keys
    supcon_none       --add_rsg True --supcon_generated none
' "$@"
