#!/usr/bin/env bash
# Show on this machine's NVIDIA GPU that everything works there: the GPU tests, and every kernel preset through
# pretrain.py and evaluate.py on a small Sudoku pack. Takes about ten minutes; what cannot run says why in a sentence.
#   scripts/verify_gpu.sh [folder for its packs and runs]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-checkpoints/verify_gpu}
python=${PYTHON:-.venv/bin/python}
pack=$work/sudoku-9x9
[ -d "$pack" ] || "$python" dataset/build_sudoku_dataset.py --generate 3x3 --train-size 1000 --num-aug 10 \
  --test-size 500 --output-dir "$pack"
status=0
for preset in config/kernels/*.yaml; do
  kernels=$(basename "$preset" .yaml)
  echo "== kernels=$kernels"
  "$python" pretrain.py data_path="$pack" kernels="$kernels" checkpoint_path="$work/$kernels" global_batch_size=384 \
    epochs=40 eval_interval=40 lr=1e-4 lr_warmup_steps=20 wandb=disabled &&
    "$python" evaluate.py checkpoint="$work/$kernels" kernels="$kernels" || status=1
done
echo "== tests"
"$python" -m pytest -m gpu tests || status=1
"$python" -m pytest -m "not gpu and not slow" tests/kernels || status=1  # compiled here
exit $status
