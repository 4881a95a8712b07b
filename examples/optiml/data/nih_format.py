"""ChestX-ray14's official layout: the names, headers and units of its files."""

ENTRY_FILE, BOX_FILE = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"
#: What the labels are called in Kaggle's copy of the set.
OLD_ENTRY_FILE = "Data_Entry_2017.csv"
TRAIN_FILE, TEST_FILE = "train_val_list.txt", "test_list.txt"
#: Our addition: the options that phantoms were drawn with.
ORIGIN_FILE = "ORIGIN.txt"
ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
#: NIH gives boxes in pixels of its released films, which are this wide and high.
BOX_SPACE = 1024
