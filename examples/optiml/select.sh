#!/usr/bin/env bash
# What the recommended OPTiML was chosen by: the rows of the ablation on all but the two sets' test films, cut anew into
# train, validation and a part that is scored. No test film of cxr-dev or cxr-seg is read.
#
#   bash examples/optiml/select.sh DATA [OPTIONS OF compare ...]
#
# DATA holds the folders cxr-dev and cxr-seg. Run it in the repository's root; stop it and repeat it at will. A row and
# seed takes ten minutes (bfloat16) to half an hour (float32) on one core; --only ROW ... makes some of them.
set -eu
data=${1:?say which folder holds cxr-dev and cxr-seg}
shift
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

optiml prepare --dataset csv --root "$data/cxr-dev" --table "$data/cxr-dev/labels.csv" --where nih_official_list=train_val \
    --patient-column patient_id --label-columns labels --source-column source --test-fraction 0.3 --val-fraction 0.08 \
    --out data/cxr-select
optiml prepare --dataset csv --root "$data/cxr-seg" --table "$data/cxr-seg/labels.csv" --where "split!=test" \
    --patient-column patient_id --label-columns label --nothing "No Finding" --mask-column mask --mask-label Lung --size 128 \
    --test-fraction 0.3 --val-fraction 0.1 --out data/seg-select
optiml compare --data data/cxr-select --segment-data data/seg-select --label Lung --rows ablation --epochs 15 \
    --fractions 1.0 --heatmap-fractions --out runs/selection \
    --results examples/optiml/results/selection "$@"
