#!/usr/bin/env bash
# Three small real sets, prepared in data/: cxr-dev under NIH's labels, its RSNA-labelled part, and cxr-seg's lung masks.
#
#   bash examples/optiml/cxr-dev-prepare.sh DATA
#
# DATA holds the folders cxr-dev and cxr-seg. Run it in the repository's root.
set -eu
data=${1:?say which folder holds cxr-dev and cxr-seg}
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

optiml prepare --dataset nih --root "$data/cxr-dev" --out data/cxr-dev
# By NIH's official list, so that validation is cut from train as pretraining cuts it: it has seen none of those patients.
optiml prepare --dataset csv --root "$data/cxr-dev" --table "$data/cxr-dev/labels.csv" --patient-column patient_id \
    --split-column nih_official_list --label-columns rsna_target=Pneumonia --blank skip --source-column source \
    --box-table "$data/cxr-dev/boxes.csv" --box-space 1024 --box-labels "Lung Opacity=Pneumonia" --out data/rsna-cxr-dev
optiml prepare --dataset csv --root "$data/cxr-seg" --table "$data/cxr-seg/labels.csv" --patient-column patient_id \
    --split-column split --label-columns label --nothing "No Finding" --mask-column mask --mask-label Lung --size 128 --out data/cxr-seg
