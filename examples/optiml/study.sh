#!/usr/bin/env bash
# The study of SELECTION.md: the rows of study.rows on cxr-pneumonia without its test films, cut anew by patient into train,
# validation and a part that is scored. No test film of cxr-pneumonia is read.
#
#   bash examples/optiml/study.sh DATA [OPTIONS OF compare ...]
#   bash examples/optiml/study.sh seconds      # what a step takes here under the networks that all rows could share
#
# DATA holds the folder cxr-pneumonia. Run it in the repository's root; stop it and repeat it at will. --only ROW ... and
# --seeds SEED ... make a part, --report-only none; --finetune-fractions 0.01 0.1 also fine-tunes.
set -eu
data=${1:?say which folder holds cxr-pneumonia}
shift
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }
results=examples/optiml/results/study

if [ "$data" = seconds ]; then
    while read -r stem size precision; do
        optiml reckon --method vicreg --films 1000 --epochs 1 --stem "$stem" --image-size "$size" --precision "$precision" \
            --steps 3 --out "$results/seconds/$stem-$size-$precision.json"
    done <<'NETWORKS'
standard 64 bf16-mixed
standard 64 32-true
standard 96 bf16-mixed
standard 128 bf16-mixed
no-pool 64 bf16-mixed
NETWORKS
    exit
fi
optiml prepare --dataset csv --root "$data/cxr-pneumonia" --table "$data/cxr-pneumonia/labels.csv" --where "split!=test" \
    --patient-column patient_id --label-columns Normal Bacterial Viral --test-fraction 0.3 --val-fraction 0.1 --size 128 \
    --out data/pneumonia-select
optiml compare --data data/pneumonia-select --rows examples/optiml/study.rows --image-size 64 --epochs 15 \
    --fractions 0.01 0.1 1.0 --small-seeds 0 1 2 3 4 --large-seeds 0 1 2 3 4 --neighbours True --finetune-fractions \
    --heatmap-fractions --monitored 1 --out runs/study --results "$results" "$@"
