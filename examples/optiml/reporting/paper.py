"""What the paper prints, digit for digit: Tables I, II, III and the one Dice coefficient in its text.

The signed differences and arrows beside its numbers are left out: many contradict the numbers themselves
(``FAITHFULNESS.md``). Percentages in Tables I and II, shares of one in Table III and for Dice, as printed.
"""

from __future__ import annotations

from ..downstream.arms import DATASETS

FRACTIONS = (0.01, 0.1, 1.0)

_TABLE1 = """
sup1    61.0 71.1 76.8  71.1 85.0 91.0  77.0 79.8 80.0
sup2    67.8 74.6 80.9  79.8 88.3 93.4  78.9 80.9 83.1
simclr  67.1 74.8 78.9  77.9 87.7 92.4  80.0 81.1 81.8
moco    66.8 74.6 79.4  77.1 86.2 92.0  79.4 81.3 82.0
densecl 67.7 76.4 81.4  82.7 88.7 93.9  79.9 81.1 82.3
byol    66.3 74.5 78.8  76.2 85.8 85.9  78.3 80.5 82.5
simsiam 66.6 74.3 78.5  75.8 85.9 91.5  78.1 80.1 82.1
vicreg  67.4 75.5 80.2  76.9 87.5 91.9  79.5 80.7 82.7
pcrlv2  67.5 75.6 81.0  75.9 87.8 93.4  80.1 81.5 82.9
optiml  68.8 77.6 82.5  83.8 89.5 94.6  81.4 82.3 84.0
"""
_TABLE2 = """
sup1    56.6 59.1 61.8  56.8 59.4 71.1  75.7 76.8 78.2
sup2    62.6 68.3 72.8  57.4 76.2 85.1  85.7 76.8 78.2
simclr  62.4 68.3 73.0  66.3 77.4 85.3  76.9 78.9 81.8
moco    61.9 68.9 72.6  66.7 74.6 85.5  76.8 78.1 81.2
densecl 62.9 69.5 72.7  64.3 73.6 85.5  76.8 78.8 81.2
byol    61.7 65.8 69.9  65.6 77.8 84.0  76.5 78.4 80.9
simsiam 62.0 65.9 69.8  65.0 77.5 84.1  76.2 77.8 80.5
vicreg  62.7 68.7 72.3  65.3 76.5 83.2  76.7 78.4 81.2
pcrlv2  59.8 68.6 72.9  59.8 71.9 78.0  76.8 80.3 81.1
optiml  63.8 70.3 73.9  66.1 78.1 86.5  80.0 81.3 82.1
"""

Key = tuple[str, str, float]


def _read(text: str) -> dict[Key, str]:
    cells = {}
    for line in text.strip().splitlines():
        arm, *values = line.split()
        columns = [(dataset, fraction) for dataset in DATASETS for fraction in FRACTIONS]
        cells.update({(arm, d, f): value for (d, f), value in zip(columns, values, strict=True)})
    return cells


#: By (arm, data set, fraction). Table I is fine-tuned, Table II frozen, whatever Table I's caption says.
TABLE1, TABLE2 = _read(_TABLE1), _read(_TABLE2)

#: Table III (NIH, fine-tuned) by (variance and covariance on, CV-SIM on), then by fraction.
TABLE3: dict[tuple[bool, bool], dict[float, str]] = {
    (False, True): {0.01: "0.679", 0.1: "0.765"},
    (True, False): {0.01: "0.678", 0.1: "0.769"},
    (False, False): {0.01: "0.673", 0.1: "0.762"},
    (True, True): {0.01: "0.685", 0.1: "0.776"},
}

#: Dice on SIIM-ACR; the others stand only in the bars of Fig. 3, without numbers.
FIG3 = {"optiml": "0.586"}
