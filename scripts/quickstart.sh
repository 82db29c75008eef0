#!/usr/bin/env bash
# Prepares long-tailed digits, trains ResNeXt-50 on them with the default losses, head and generator, and tests it.
# Run again, it goes on where it was stopped, or says that it is done. Extra flags go to imagenet_lt_train.py and name
# the run, so --run_name and --root_model are not among them: bash scripts/quickstart.sh --seed 1
set -euo pipefail
cd "$(dirname "$0")/.."
case " $*" in
    *" --run_name"* | *" --root_model"*) echo 'error: --run_name and --root_model are set here; see the top of this script' >&2; exit 2 ;;
esac
source scripts/environment.sh requirements.txt

name=quickstart$(printf '_%s' "$@" | sed 's/_--/_/g; s/[^A-Za-z0-9.=-]/_/g; s/_$//')
recipe=(--data_dir data/digits --epochs 50 --batch_size 32 --lr 0.05 --lr_schedule cosine --seed 0)

python scripts/prepare_data.py digits
python imagenet_lt_train.py "${recipe[@]}" --run_name "$name" --resume "$@"
python imagenet_lt_test.py --model_dir "$name"
