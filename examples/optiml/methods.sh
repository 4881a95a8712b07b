#!/usr/bin/env bash
# The comparison of COMPARISON.md on cxr-pneumonia: a learning rate for each method, then the table on the test films.
#
#   bash examples/optiml/methods.sh rates DATA [OPTIONS OF compare ...]    # rates.rows, without the test films; writes methods.rows
#   bash examples/optiml/methods.sh table DATA [OPTIONS OF compare ...]    # methods.rows, scored on the test films
#
# DATA holds the folder cxr-pneumonia. Run it in the repository's root; stop it and repeat it at will. --only ROW ... and
# --seeds SEED ... make a part, --report-only none.
set -eu
what=${1:-}
data=${2:?say rates or table, and which folder holds cxr-pneumonia}
shift 2
here=examples/optiml
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }

films=(--dataset csv --root "$data/cxr-pneumonia" --table "$data/cxr-pneumonia/labels.csv" --patient-column patient_id
    --label-columns Normal Bacterial Viral --size 128)
sizes=(--image-size 64 --epochs 15 --fractions 0.01 0.1 1.0 --small-seeds 0 1 2 3 4 --large-seeds 0 1 2 3 4
    --neighbours True --finetune-fractions --heatmap-fractions --monitored 1)

case $what in
rates)
    optiml prepare "${films[@]}" --where "split!=test" --test-fraction 0.3 --val-fraction 0.1 --out data/pneumonia-select
    optiml compare --data data/pneumonia-select --rows $here/rates.rows "${sizes[@]}" --seeds 0 \
        --out runs/rates --results $here/results/rates "$@"
    "${PYTHON:-python}" -m examples.optiml.reporting.rates $here/rates.rows $here/results/rates >$here/methods.rows
    ;;
table)
    optiml prepare "${films[@]}" --split-column split --out data/pneumonia
    optiml compare --data data/pneumonia --rows $here/methods.rows "${sizes[@]}" --seeds 0 1 2 \
        --out runs/methods --results $here/results/methods "$@"
    ;;
*)
    echo "say rates or table, not '$what'" >&2
    exit 2
    ;;
esac
