#!/usr/bin/env bash
# The comparison of COMPARISON.md and PHANTOMS.md under the small budget: the methods and the ablation on cxr-dev, the methods on phantoms.
#
#   bash examples/optiml/compare.sh methods|ablation DATA [OPTIONS OF compare ...]
#   bash examples/optiml/compare.sh phantoms [OPTIONS OF compare ...]
#
# DATA holds the folders cxr-dev and cxr-seg. Run it in the repository's root; stop it and repeat it at will. A row and
# seed takes 20 to 50 minutes on one core in float32 (PCRLv2 up to 100); --only ROW ... --seeds SEED ... makes some of them.
set -eu
what=${1:-}
shift "$(($# < 1 ? $# : 1))"
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

case $what in
methods | ablation)
    data=${1:?say which folder holds cxr-dev and cxr-seg}
    shift
    bash "$(dirname "$0")/cxr-dev-prepare.sh" "$data"
    optiml compare --data data/cxr-dev --dataset nih-cxr-dev --rsna-data data/rsna-cxr-dev --segment-data data/cxr-seg \
        --label Lung --rows "$what" "$@"
    ;;
phantoms)
    optiml prepare --dataset phantom --phantom-train 2000 --phantom-test 600 --phantom-size 64 --out data/phantoms
    optiml compare --data data/phantoms --segment-data data/phantoms --label Effusion --rows methods \
        --out runs/compare-phantoms --results examples/optiml/results/compare-phantoms "$@"
    ;;
*)
    echo "say methods, ablation or phantoms, not '$what'" >&2
    exit 2
    ;;
esac
