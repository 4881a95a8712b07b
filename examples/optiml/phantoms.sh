#!/usr/bin/env bash
# The methods on drawn films under the small budget: the comparison of PHANTOMS.md.
#
#   bash examples/optiml/phantoms.sh [OPTIONS OF compare ...]
#
# Run it in the repository's root; stop it and repeat it at will. A row and seed takes 20 to 50 minutes on one core in
# float32 (PCRLv2 up to 100); --only ROW ... --seeds SEED ... makes some of them.
set -eu
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

optiml prepare --dataset phantom --phantom-train 2000 --phantom-test 600 --phantom-size 64 --out data/phantoms
optiml compare --data data/phantoms --segment-data data/phantoms --label Effusion --rows methods \
    --out runs/compare-phantoms --results examples/optiml/results/compare-phantoms "$@"
