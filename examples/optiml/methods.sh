#!/usr/bin/env bash
# The comparison of COMPARISON.md on cxr-pneumonia, in four parts:
#
#   rates      every method under the three learning rates of rates.rows, without the test films, as study.sh divides them
#   choose     writes methods.rows and ablation.rows with the best rate of each method
#   table      the rows of methods.rows, three seeds, scored on the test films
#   ablation   the rows of ablation.rows likewise
#
#   bash examples/optiml/methods.sh DATA [OPTIONS OF compare ...]         # all of them in turn
#   bash examples/optiml/methods.sh PART DATA [OPTIONS OF compare ...]    # one
#
# DATA holds the folder cxr-pneumonia. Run it in the repository's root; stop it and repeat it at will. With a part, --only
# ROW ... and --seeds SEED ... make some of it, --report-only none. --precision bf16-mixed asks for that.
# --imagenet-weights FILE adds a row to methods.rows and to the table.
set -eu
parts="rates choose table ablation"
case ${1:-} in rates | choose | table | ablation) parts=$1 && shift ;; esac
data=${1:?say which folder holds cxr-pneumonia}
shift
optiml() { "${PYTHON:-python}" -m examples.optiml "$@"; }
here=examples/optiml
films() {
    optiml prepare --dataset csv --root "$data/cxr-pneumonia" --table "$data/cxr-pneumonia/labels.csv" \
        --patient-column patient_id --label-columns Normal Bacterial Viral --size 128 "$@"
}
rows() {
    optiml compare --image-size 64 --epochs 15 --fractions 0.01 0.1 1.0 --small-seeds 0 1 2 3 4 --large-seeds 0 1 2 3 4 \
        --neighbours True --finetune-fractions --heatmap-fractions --monitored 1 "$@"
}

for part in $parts; do
    case $part in
    rates)
        films --where "split!=test" --test-fraction 0.3 --val-fraction 0.1 --out data/pneumonia-select
        rows --data data/pneumonia-select --rows $here/rates.rows --seeds 0 --out runs/rates --results $here/results/rates "$@"
        ;;
    choose)
        case " $* " in *" --imagenet-weights"*) also=--imagenet ;; *) also= ;; esac
        optiml choose --rows $here/rates.rows --results $here/results/rates --out $here $also
        ;;
    *)
        if [ "$part" = table ]; then file=methods; else file=ablation; fi
        films --split-column split --out data/pneumonia
        rows --data data/pneumonia --rows $here/$file.rows --seeds 0 1 2 --out runs/methods --results $here/results/methods "$@"
        ;;
    esac
done
