#!/usr/bin/env bash
# Do synthetic images of rare classes help: drawn from text or over real images, all or those that a run agrees with?
#
#     FILTER=checkpoint/RUN bash scripts/ablate_synthetic.sh data/CIFAR10 --seeds 0 1 2 -- --arch resnet32 --epochs 30
#     SYNTHESIS='--target 500 --model DIR' FILTER=checkpoint/RUN bash scripts/ablate_synthetic.sh ...
#
# RUN was trained on the same classes without synthetic images; SYNTHESIS are flags of scripts/synthesize_tail.py. The
# images lie in DATA/synthetic_*; drawing them goes on where it was stopped. --list and --line draw none: for Slurm, give
# the command without them first, or draw the images on one machine.
# Flags, JOBS=2, Slurm, where things lie: bash scripts/ablate_synthetic.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || source scripts/environment.sh requirements.txt # an environment of yours, or .venv

data=${1:-}
draw() { # into the folder $1, in the mode $2; the other arguments go to the script
    # shellcheck disable=SC2086 # SYNTHESIS is several words
    python scripts/synthesize_tail.py "$data" --output "$1" --mode "$2" ${SYNTHESIS:-} "${@:3}"
}
if [[ ! " $* " =~ \ (--help|-h|--list|--line(=[0-9]*)?)\  ]]; then
    [ -n "${FILTER:-}" ] || { echo "error: FILTER is to name a trained run, like FILTER=checkpoint/RUN" >&2; exit 2; }
    for mode in text2img img2img; do
        all=$data/synthetic_$mode agreed=$data/synthetic_${mode}_agreed
        draw "$all" $mode
        if [ ! -e "$agreed" ]; then # what is drawn already need not be drawn again
            rm -rf "$agreed.part" && cp -r "$all" "$agreed.part" && mv "$agreed.part" "$agreed"
        fi
        draw "$agreed" $mode --filter_model "$FILTER"
    done
fi
quoted="'\\''"
folder="'${data//"'"/$quoted}'" # printf %q may write $'...', which is not every shell's
exec python scripts/sweep.py ablate_synthetic "
    none             --synthetic_weight 0
    # black, flat and repeated images are out everywhere; agreed: so are those whose class the run FILTER does not find
    text2img         --synthetic_weight 1 --synthetic_dir $folder/synthetic_text2img
    text2img_agreed  --synthetic_weight 1 --synthetic_dir $folder/synthetic_text2img_agreed
    img2img          --synthetic_weight 1 --synthetic_dir $folder/synthetic_img2img
    img2img_agreed   --synthetic_weight 1 --synthetic_dir $folder/synthetic_img2img_agreed
" "$@"
