#!/usr/bin/env bash
# From nothing to a trained model: build a small Sudoku pack, train on it, evaluate on puzzles never seen, look at some.
# Minutes on a laptop CPU. Arguments are further options of pretrain.py, e.g. seed=1.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh report

run=checkpoints/demo
python pretrain.py experiment=sudoku_demo checkpoint_path=$run "$@"
python evaluate.py checkpoint=$run show=3
echo
echo "One more, from the shell: python evaluate.py checkpoint=$run puzzle=.....41..1.3..41"
python evaluate.py checkpoint=$run puzzle=.....41..1.3..41
echo
echo "A hard one, by the model that comes with this package, trained on a GPU:"
hard=8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..
echo "python evaluate.py checkpoint=sudoku puzzle=$hard ensemble.augmentations=16"
python evaluate.py checkpoint=sudoku puzzle=$hard ensemble.augmentations=16
