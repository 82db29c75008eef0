#!/usr/bin/env bash
# What does each loss do alone, and in which company? The seven losses of the original suite on NormedLinear.
#
#     bash scripts/ablate_losses.sh data/digits --seeds 0 1 2 -- --arch resnet32 --epochs 30 --lr 0.05
#     GRID=1 bash scripts/ablate_losses.sh ...      # all 127 combinations of the seven, in place of the seven alone
#
# Flags, JOBS=2, Slurm, where things lie: bash scripts/ablate_losses.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

losses=(cross_entropy_loss ldam_loss focal_loss supcon_loss arc_margin_loss add_margin_loss sphere_loss)
names=(ce ldam focal supcon arcmar addmar sphere)

# The line of a setting: the losses whose bits are set in $1 are on, all others off; the other arguments stay.
setting() {
    local bits=$1 name='' flags=() on
    for i in "${!losses[@]}"; do
        on=False
        if ((bits >> i & 1)); then name+=_${names[i]} on=True; fi
        flags+=("--add_${losses[i]}" "$on")
    done
    echo "${name#_} ${flags[*]} ${*:2}"
}

if [ -n "${GRID:-}" ]; then
    sweep=ablate_losses_grid
    settings=$(
        echo '# all combinations with the defaults of the original: factors 0.1 (LDAM) and 0.9 (SupCon), ICF weights, RSG'
        for ((bits = 1; bits < 1 << ${#losses[@]}; bits++)); do setting "$bits"; done
    )
else
    sweep=ablate_losses
    settings=$(
        echo '# only the loss differs: factor 1 (another one would scale the learning rate and divide the weight decay), no class weights, no RSG;'
        echo '# arcmar, addmar, sphere: cross-entropy on that head and on the main one, which predicts'
        for i in "${!losses[@]}"; do
            setting $((1 << i)) --ldam_loss_weight 1 --supcon_loss_weight 1 --ldam_weight_type none --add_rsg False
        done
    )
fi
exec python scripts/sweep.py "$sweep" "$settings" "$@"
