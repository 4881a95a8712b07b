#!/usr/bin/env bash
# `make example` for the seeds 0, 1 and 2; writes results/example/seedN.json, which the pages quote.
#
#   bash examples/optiml/example-seeds.sh
#
# Run it in the repository's root. Each seed draws other phantoms and trains another network. Stop it and repeat it at will.
set -eu
for seed in 0 1 2; do
    out=runs/example
    [ "$seed" = 0 ] || out=runs/example-seed$seed
    "${PYTHON:-python}" -m examples.optiml example --seed "$seed" --out "$out" \
        --results "examples/optiml/results/example/seed$seed.json"
done
