#!/usr/bin/env bash
# Runs the rows of docs/ledger.md that are about DATA, and writes what they gave into it.
#
#     bash scripts/reproduce_ledger.sh data/CIFAR10 --seeds 0 1 2                     # the recipes' own epochs; a GPU
#     JOBS=2 bash scripts/reproduce_ledger.sh data/CIFAR10 --seeds 0 -- --epochs 30   # the same, shortened
#     ROWS='cifar_ce cifar_rsg' bash scripts/reproduce_ledger.sh ...                  # some of them
#
# The name of DATA tells which rows: CIFAR10, CIFAR100, mini-ImageNet, or any other folder. What is done is skipped.
# Where --root_model lets the runs lie elsewhere: python scripts/ledger.py FOLDER
# Flags, JOBS=2, Slurm, where things lie: bash scripts/reproduce_ledger.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

case $(basename -- "${1:-}") in
    CIFAR*) rows='cifar_ce cifar_ldam_drw cifar_rsg cifar_mixup_drw cifar_best cifar_best_x4 original' ;;
    mini-ImageNet*) rows='original mini_imagenet' ;;
    --help | -h) rows= ;;
    -*) echo 'error: DATA comes first, the flags after it; see --help' >&2; exit 2 ;;
    *) rows= ;;
esac
rows+=' any_folder any_folder_ce'
settings='# what follows -- overrides a recipe'
for row in ${ROWS:-$rows}; do
    recipe=$row flags=''
    if [ "$row" = any_folder_ce ]; then # the baseline of any_folder: plain cross-entropy on a Linear head
        recipe=any_folder flags='--norm_out False --add_logit_adjusted_loss False --add_cross_entropy_loss True'
    fi
    settings+=$'\n'"$row @scripts/recipes/$recipe.txt $flags"
done
code=0
python scripts/sweep.py reproduce_ledger "$settings" "$@" || code=$?
if [[ ! " $* " =~ \ (--help|-h|--list|--line(=[0-9]*)?)\  ]] && ((code < 2)); then # 1: some runs failed, the others count
    shopt -s nullglob
    python scripts/ledger.py checkpoint/ledger_*
fi
exit $code
