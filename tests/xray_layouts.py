"""The official layouts in miniature, generated, with the traps that ``shared/data/layouts/LAYOUTS.md`` names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from examples.optiml.data.index import ChestIndex
from examples.optiml.data.prepare.command import Prepared, prepare
from examples.optiml.data.prepare.settings import PrepareConfig

Pixels = NDArray[Any]


def film(seed: int, height: int = 40, width: int = 40, top: int = 255) -> NDArray[np.uint16]:
    """Smooth values from 0 to ``top``."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin(0.11 * x + seed) + np.cos(0.13 * y + 0.3 * seed)
    return np.round(top * (waves - waves.min()) / np.ptp(waves)).astype(np.uint16)


def write_png(path: Path, seed: int = 0, mode: str = "L", side: int = 40) -> NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = film(seed, side, side).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(path)
    return grey


def write_dicom(path: Path, pixels: Pixels, photometric: str = "MONOCHROME2", jpeg: bool = False, **tags: Any) -> None:
    """A DICOM file of these pixels; ``bits`` and further header values by keyword."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored = tags.pop("bits", data.BitsAllocated)
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    if jpeg:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        data.PixelData = encapsulate([buffer.getvalue()])
        data["PixelData"].is_undefined_length = True
    else:
        data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_text(path: Path, lines: Iterable[str], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode())
    return path


def nih(root: Path) -> Path:
    """CRLF, nested folders, one RGBA, a 9-field box header, ``Infiltrate``, one entry without file."""
    rows = [
        ("00000001_000.png", "Cardiomegaly", 1), ("00000001_001.png", "Cardiomegaly|Emphysema", 1),
        ("00000002_000.png", "No Finding", 2), ("00000003_000.png", "Hernia", 3),
        ("00000004_000.png", "Infiltration|Nodule", 4), ("00000005_000.png", "Mass", 5),
    ]  # fmt: skip
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    entries = [f"{name},{found},0,{patient},57,M,PA,2682,2749,0.143,0.143" for name, found, patient in rows]
    write_text(root / "Data_Entry_2017_v2020.csv", [header, *entries], "\r\n")
    box = "00000004_000.png,Infiltrate,256,512,128.0,64,,,"
    write_text(root / "BBox_List_2017.csv", ["Image Index,Finding Label,Bbox [x,y,w,h],,,", box], "\r\n")
    write_text(root / "train_val_list.txt", [name for name, _, p in rows if p < 4], "\r\n")
    write_text(root / "test_list.txt", [name for name, _, p in rows if p >= 4], "\r\n")
    for number, (name, _, patient) in enumerate(rows[:5]):
        folder = "images_001/images" if number < 3 else "images_002/images"
        write_png(root / folder / name, patient, "RGBA" if number == 0 else "L")
    return root


def rsna(root: Path) -> Path:
    """JPEG in DICOM, two boxes as two rows, blank boxes, an id without file, one film that fails to decode."""
    rows = ["aa,512,256,256,128,1", "aa,0,0,512,1024,1", "bb,,,,,0", "cc,,,,,0", "dd,1,2,3,4,1", "ee,,,,,0"]
    write_text(root / "stage_2_train_labels.csv", ["patientId,x,y,width,height,Target", *rows])
    for seed, name in enumerate(("aa", "bb", "cc", "ee")):
        path = root / "stage_2_train_images" / f"{name}.dcm"
        write_dicom(path, film(seed).astype(np.uint8), jpeg=True, PatientID=name)
    path.write_bytes(path.read_bytes()[:300])
    return root


def encode_runs(mask: NDArray[np.bool_]) -> str:
    """SIIM's encoding, by the book: down the columns, each start from the end of the run before."""
    edges = np.flatnonzero(np.diff(np.pad(mask.T.ravel().astype(int), 1)))
    text, last = [], 0
    for start, end in edges.reshape(-1, 2).tolist():
        text += [str(start - last), str(end - start)]
        last = end
    return " ".join(text)


def siim(root: Path, regions: list[NDArray[np.bool_]], release: int = 1) -> Path:
    """One positive image whose regions are rows of their own, two negative ones, one without file; odd spaces."""
    names = ("1.2.3", "1.2.4", "1.2.5", "1.2.6") if release == 1 else ("ID_3", "ID_4", "ID_5", "ID_6")
    space = " " if release == 1 else ""
    rows = [f"{names[0]},{space}{encode_runs(region)}" for region in regions]
    rows += [f"{names[1]},-1", f"{names[2]}, -1", f"{names[3]},-1"]
    table = "train-rle.csv" if release == 1 else "stage_2_train.csv"
    write_text(root / table, [f"ImageId,{space}EncodedPixels", *rows])
    for seed, name in enumerate(names[:3]):
        folder = f"dicom-images-train/9.{seed}/8.{seed}"
        if release == 2:  # some in a folder of their own, some where the first stage had its test films
            folder = "stage_2_images" if seed < 2 else f"dicom-images-test/9.{seed}/8.{seed}"
        # The first two are films of one patient, which only the header tells.
        pixels = film(seed, 64, 64).astype(np.uint8)
        write_dicom(root / folder / f"{name}.dcm", pixels, jpeg=True, PatientID=("p1", "p1", "p2")[seed])
    return root


KAGGLE_ROWS = [
    "n0,No finding,14,R1,,,,", "n0,No finding,14,R2,,,,", "n0,No finding,14,R3,,,,",
    "v1,Cardiomegaly,3,R1,10,20,30,60", "v1,Cardiomegaly,3,R2,11,20,31,60", "v1,Cardiomegaly,3,R2,1,2,3,6",
    "v1,ILD,5,R3,0,0,40,50",
    "v1,Nodule/Mass,8,R1,5,5,9,9", "v1,Nodule/Mass,8,R2,5,5,9,9", "v1,Nodule/Mass,8,R3,5,5,9,9",
    "gone,No finding,14,R1,,,,",
]  # fmt: skip


def vinbig_kaggle(root: Path) -> Path:
    """Three readers who disagree, MONOCHROME1 without any rescale or window, a reader with two boxes."""
    write_text(root / "train.csv", ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", *KAGGLE_ROWS])
    write_dicom(root / "train" / "n0.dicom", film(1, 50, 40, 4095), "MONOCHROME1", bits=12)
    write_dicom(root / "train" / "v1.dicom", film(2, 50, 40, 65535))
    return root


PHYSIONET_HEADER = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis,Other diseases,No finding"
)


def vinbig_physionet(root: Path) -> Path:
    """28 columns, three rows an image in train and a consensus row in test, which spells a column differently."""

    def row(*on: str) -> str:
        return ",".join("1" if name in on else "0" for name in PHYSIONET_HEADER.split(","))

    train = [
        f"t0,R1,{row('Cardiomegaly', 'Other diseases')}", f"t0,R2,{row('Cardiomegaly', 'Other diseases', 'COPD')}",
        f"t0,R3,{row('ILD')}", f"t1,R1,{row('No finding')}", f"t1,R2,{row('No finding')}", f"t1,R3,{row()}",
    ]  # fmt: skip
    notes = root / "annotations"
    write_text(notes / "image_labels_train.csv", [f"image_id,rad_id,{PHYSIONET_HEADER}", *train])
    test = f"image_id,{PHYSIONET_HEADER}".replace("Other diseases", "Other disease")
    write_text(notes / "image_labels_test.csv", [test, f"s0,{row('ILD', 'Other diseases')}"])
    boxes = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max", "t0,R1,Cardiomegaly,4,5,24,30", "t0,R3,ILD,0,0,8,8"]
    write_text(notes / "annotations_train.csv", [*boxes, "t1,R1,No finding,,,,"])
    write_text(notes / "annotations_test.csv", ["image_id,class_name,x_min,y_min,x_max,y_max", "s0,ILD,20,25,40,50"])
    for seed, name in enumerate(("train/t0", "train/t1", "test/s0")):
        write_dicom(root / f"{name}.dicom", film(seed, 50, 40, 4095), bits=12)
    return root


# --- preparing one, and what came of it ------------------------------------------------------------------------------


def run(dataset: Any, root: Path, out: Path, **options: Any) -> Prepared:
    return prepare(PrepareConfig(dataset, out, root, **{"workers": 1, "size": 32, **options}))


def findings(index: ChestIndex) -> dict[str, set[str]]:
    names = [name.removesuffix(".png") for name in index.names.tolist()]
    return {
        name: {index.classes[c] for c in np.flatnonzero(row)} for name, row in zip(names, index.labels, strict=True)
    }


def column(index: ChestIndex, field: str) -> dict[str, str]:
    names = [name.removesuffix(".png") for name in index.names.tolist()]
    return dict(zip(names, getattr(index, field).tolist(), strict=True))


def reasons(out: Path) -> dict[str, str]:
    with (out / "skipped.csv").open(newline="") as file:
        return {row["item"]: row["reason"] for row in csv.DictReader(file)}
