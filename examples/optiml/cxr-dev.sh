#!/usr/bin/env bash
# Every stage on three small real sets: cxr-dev under NIH's labels, its RSNA-labelled part, and cxr-seg's lung masks.
#
#   bash examples/optiml/cxr-dev.sh DATA [REPORT] [OPTIONS OF xray ...]
#
# DATA holds the folders cxr-dev and cxr-seg. Run it in the repository's root; stop it and repeat it at will.
set -eu
data=${1:?say which folder holds cxr-dev and cxr-seg}
report=${2:-report}
shift "$(($# < 2 ? $# : 2))"
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

bash "$(dirname "$0")/cxr-dev-prepare.sh" "$data"
# Pretrained once; RSNA's films are NIH's, so the same network serves both columns.
optiml xray --data data/cxr-dev --dataset nih-cxr-dev --segment-data data/cxr-seg --label Lung --out runs/cxr-dev "$@"
optiml xray --data data/rsna-cxr-dev --dataset rsna-cxr-dev --run runs/cxr-dev/*-seed* --out runs/rsna-cxr-dev "$@"
optiml report --runs runs/cxr-dev/downstream runs/rsna-cxr-dev/downstream --out "$report"
