"""Names of what is compared: a record's arm and data set, and the paper's word for each."""

from __future__ import annotations

from typing import Any

SUP1, SUP2 = "sup1", "sup2"
#: Columns of Tables I and II: the data set's name in a record, and the paper's word for it.
DATASETS = {"nih": "NIH", "vinbig": "VinBig-CXR", "rsna": "RSNA"}
#: Rows: the arm in a record, and the paper's word for it.
ROWS = {
    "sup1": "Sup.1 (random)", "sup2": "Sup.2 (ImageNet)", "simclr": "SimCLR", "moco": "MoCo v2", "densecl": "DenseCL",
    "byol": "BYOL", "simsiam": "SimSiam", "vicreg": "VICReg", "pcrlv2": "PCRLv2", "optiml": "OPTiML",
}  # fmt: skip
#: Arms of Table III, in its order: (variance and covariance on, CV-SIM on).
ABLATION = {
    "optiml-no-varcov": (False, True),
    "optiml-no-cvsim": (True, False),
    "optiml-neither": (False, False),
    "optiml": (True, True),
}


def arm_of(run: dict[str, Any]) -> str:
    """Row of a pretraining run, from its config.json; OPTiML without one of its parts is a row of Table III."""
    method = str(run["method"])
    if method != "optiml":
        return method
    options = run.get("options", {})
    cvsim = options.get("marginals") not in ("uniform", "overlap")
    parts = (options.get("beta", 1) > 0 and options.get("eta", 1) > 0, cvsim)
    return next(arm for arm, on in ABLATION.items() if on == parts)


def paper_dataset(dataset: str) -> str | None:
    """The paper's column beside which a data set stands: ``nih`` and ``nih-cxr-dev`` are NIH, phantoms are none."""
    name = dataset.partition("-")[0]
    return name if name in (*DATASETS, "siim") else None
