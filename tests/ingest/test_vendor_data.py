"""Real files of others: shape and sampling as their manifest states, or the refusal that it states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.ingest.describe import SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import MovieFiles, discover
from schemas.errors import SourceError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real movies is not beside the checkout"),
]
ACCEPTED = {  # name: shape, dtype, sampling [Å/px], last frame time [s]
    "vendor/example_Au_nanoparticle.emd": ((1, 2048, 2048), "uint16", 0.07498, 0.0),
    "vendor/fei_example_tem_stack.emd": ((2, 3, 3), "int16", 0.08173, 0.8),
    "vendor/example_Se_implanted_MoS2.dm3": ((1, 1024, 1024), "uint32", 0.12695, 0.0),
    "vendor/16_STOimage_1.ser": ((1, 1024, 1024), "uint16", 0.10013, 0.0),
    "vendor/16_STOimage.emi": ((1, 1024, 1024), "uint16", 0.10013, 0.0),
    "vendor/Acquisition_18.emd": ((1, 1024, 1024), "uint16", 0.1225, 0.0),
}
NO_TIMES, NO_SAMPLING = "no frame times", "no pixel size"
REFUSED = {  # name: shape once the settings are given, what the refusal says
    "vendor/03_Scanning Preview_1.ser": ((5, 128, 128), [NO_TIMES]),
    "vendor/Custom_movie.mrc": ((30, 16, 16), ["-10 Å", "positive", NO_TIMES]),
    "vendor/ROI_Random_Scan_movie.mrc": ((348, 16, 16), ["-10 Å", "positive", NO_TIMES]),
    "vendor/dmTest_3D_int16_64,65,66.dm3": ((66, 65, 64), ["3 nm (y) × 2 pm (x)", "not square", NO_TIMES]),
    "vendor/dmTest_3D_int16_64,65,66.dm4": ((66, 65, 64), ["3 nm (y) × 2 pm (x)", "not square", NO_TIMES]),
    "vendor/dmTest_float32_nonSquare_diffPixelSize.dm3": ((1, 64, 128), ["2 A (y) × 1 nm (x)", "not square"]),
    "vendor/dmTest_float32_nonSquare_diffPixelSize.dm4": ((1, 64, 128), ["2 A (y) × 1 nm (x)", "not square"]),
    "vendor/test_tvips_2345_split_000.tvips": ((6, 4, 5), ["1/nm", "reciprocal", "do not increase"]),
    "movies/Si3_trimer_graphene.tif": ((44, 256, 256), [NO_TIMES]),
    "movies/Si1C4_static_graphene.tif": ((9, 256, 256), [NO_TIMES]),
    "movies/udvd_electron_2_raw.tif": ((40, 100, 100), [NO_SAMPLING, NO_TIMES]),
    "movies/udvd_electron_2_denoised.tif": ((40, 100, 100), [NO_SAMPLING, NO_TIMES]),
    "movies/gold_growth": ((13, 1917, 1851), [NO_TIMES]),
}
OF_THE_FILE = {  # sampling [Å/px] of files that lack only their times
    "movies/Si3_trimer_graphene.tif": 0.078125,
    "movies/Si1C4_static_graphene.tif": 0.1211,
    "movies/gold_growth": 1.635,
    "vendor/03_Scanning Preview_1.ser": 3.8435,
}


def files_of(name: str) -> MovieFiles:
    (files,) = discover([DATA / name]).movies
    return files


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    shape, dtype, sampling, last = ACCEPTED[name]
    described = describe(files_of(name), SourceOverrides())
    assert (described.shape, described.dtype) == (shape, dtype)
    assert described.sampling == pytest.approx(sampling, rel=1e-3)
    assert described.time[-1] == pytest.approx(last, rel=1e-3)
    frames = read_frames(described, 0, shape[0])
    assert (frames.shape, frames.dtype.name) == (shape, dtype)
    assert frames.std() > 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_without_settings_and_read_with_them(name: str) -> None:
    shape, told = REFUSED[name]
    with pytest.raises(SourceError) as caught:
        describe(files_of(name), SourceOverrides())
    assert all(words in str(caught.value) for words in told), caught.value
    assert "--set source." in str(caught.value)
    described = describe(files_of(name), SourceOverrides(sampling=0.2, frame_interval=0.5))
    assert described.shape == shape
    frames = read_frames(described, 0, shape[0])
    assert frames.shape == shape
    np.testing.assert_array_equal(read_frames(described, shape[0] // 2, shape[0]), frames[shape[0] // 2 :])


@pytest.mark.parametrize("name", OF_THE_FILE)
def test_sampling_of_the_file(name: str) -> None:
    described = describe(files_of(name), SourceOverrides(frame_interval=0.5))
    assert described.sampling == pytest.approx(OF_THE_FILE[name], rel=1e-3)


@pytest.mark.parametrize("part", ["001", "002"])
def test_later_parts_alone(part: str) -> None:
    with pytest.raises(SourceError, match="name part 000"):
        describe(files_of(f"vendor/test_tvips_2345_split_{part}.tvips"), SourceOverrides(0.2, 0.5))


def test_every_vendor_file_is_accounted_for() -> None:
    known = {Path(name).name for name in (*ACCEPTED, *REFUSED)}
    known |= {"03_Scanning Preview.emi", "test_tvips_2345_split_001.tvips", "test_tvips_2345_split_002.tvips"}
    assert {path.name for path in (DATA / "vendor").iterdir()} <= known


@pytest.mark.parametrize("name", [*ACCEPTED, *(n for n in REFUSED if n.startswith("vendor"))])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # theirs
def test_pixels_are_those_that_rosettasciio_reads(name: str) -> None:
    from rsciio import digitalmicrograph, emd, mrc, tia, tvips

    path = DATA / name
    reader = {".dm3": digitalmicrograph, ".dm4": digitalmicrograph, ".ser": tia, ".emi": tia, ".emd": emd,
              ".mrc": mrc, ".tvips": tvips}[path.suffix]  # fmt: skip
    theirs = np.asarray(reader.file_reader(str(path))[0]["data"])
    described = describe(files_of(name), SourceOverrides(sampling=0.2, frame_interval=0.5))
    ours = read_frames(described, 0, described.shape[0])
    if path.name == "Acquisition_18.emd":  # RosettaSciIO swaps the axes, which the file names Y and X in this order
        theirs = theirs.T
    np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)
