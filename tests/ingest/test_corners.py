"""Corners of single formats: byte orders, odd modes, choices within a file, and what must be refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr

from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.reading import read_frames
from pipeline.ingest.sources import MovieFiles, discover
from schemas.errors import SourceError


def one(path: Path, **more: object) -> Description:
    (files,) = discover([path]).movies
    return describe(files, SourceOverrides(**{"sampling": 0.2, "frame_interval": 0.5, **more}))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float32", "float16"])
def test_mrc_modes(dtype: str, write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(3).astype(dtype)
    described = one(write.mrc(tmp_path / "a.mrc", data))
    assert described.dtype == dtype
    np.testing.assert_array_equal(read_frames(described, 0, 3), data)


def test_big_endian_mrc(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(3)
    header = np.zeros(1, mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">"))
    header["nz"], header["ny"], header["nx"], header["mode"] = *data.shape, 6
    header["map"], header["machst"] = b"MAP ", (0x11, 0x11, 0, 0)
    (tmp_path / "a.mrc").write_bytes(header.tobytes() + data.astype(">u2").tobytes())
    described = one(tmp_path / "a.mrc")
    assert read_frames(described, 0, 3).dtype.isnative
    np.testing.assert_array_equal(read_frames(described, 1, 3), data[1:])
    with pytest.raises(SourceError, match="no pixel size"):
        one(tmp_path / "a.mrc", sampling=None)


def test_unknown_mrc_mode(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.mrc(tmp_path / "a.mrc", write.movie(3))
    with path.open("r+b") as file:
        file.seek(12)
        file.write((101).to_bytes(4, "little"))  # 4 bits per pixel
    with pytest.raises(SourceError, match="MRC mode 101"):
        one(path)


@pytest.mark.parametrize("dtype", ["int16", "uint8", "int32", "uint32", "float32"])
def test_dm_types(dtype: str, write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(3).astype(dtype)
    described = one(write.dm4(tmp_path / "a.dm4", data, [(1.0, "s"), (0.2, "Å"), (0.2, "Å")]))
    assert described.dtype == dtype
    np.testing.assert_array_equal(read_frames(described, 0, 3), data)


def test_dm_cut_after_its_pixels_keeps_every_frame(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(3)
    path = write.dm4(tmp_path / "a.dm4", data, [(1.0, "s"), (0.2, "Å"), (0.2, "Å")])
    write.cut(path, -10)  # inside the name of the image
    np.testing.assert_array_equal(read_frames(one(path, on_error="quarantine"), 0, 3), data)
    assert any("end early" in note for note in one(path, on_error="quarantine").notes)


def test_dm_written_here_is_read_alike_by_rosettasciio(write: SimpleNamespace, tmp_path: Path) -> None:
    from rsciio.digitalmicrograph import file_reader

    data = write.movie(3)
    path = write.dm4(tmp_path / "a.dm4", data, [(0.4, "s"), (0.02, "nm"), (0.02, "nm")])
    (theirs,) = file_reader(str(path))
    np.testing.assert_array_equal(theirs["data"], data)
    assert [axis["units"] for axis in theirs["axes"]] == ["s", "nm", "nm"]


@pytest.mark.parametrize("version", [0x0210, 0x0220])
def test_ser_written_here_is_read_alike_by_rosettasciio(version: int, write: SimpleNamespace, tmp_path: Path) -> None:
    from rsciio.tia import file_reader

    data = write.movie(3)
    (theirs,) = file_reader(str(write.ser(tmp_path / "a_1.ser", data, 2e-11, version=version)))
    np.testing.assert_array_equal(theirs["data"], data)


def test_tvips_written_here_is_read_alike_by_rosettasciio(write: SimpleNamespace, tmp_path: Path) -> None:
    from rsciio.tvips import file_reader

    data = write.movie(5)
    (theirs,) = file_reader(str(write.tvips(tmp_path, data, [2, 3])[0]))
    np.testing.assert_array_equal(theirs["data"], data)


def test_ser_without_an_image(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.ser(tmp_path / "a_1.ser", write.movie(2), 2e-11)
    with path.open("r+b") as file:
        file.seek(18)
        file.write((0).to_bytes(4, "little"))  # none of its elements is valid
    with pytest.raises(SourceError, match="holds no image"):
        one(path)


def test_time_tags_of_whole_seconds_are_a_hint_only(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.ser(tmp_path / "a_1.ser", write.movie(6), 2e-11)
    with pytest.raises(SourceError, match="count whole seconds, 1 s from the first frame to the last"):
        one(path, frame_interval=None)


def test_empty_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 4, 4), "u2"))
    with pytest.raises(SourceError, match=r"a\.npy: holds no complete frame"):
        one(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((4, 0, 4), "u2"))
    with pytest.raises(SourceError, match=r"shape \(4, 0, 4\)"):
        one(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 4, 4)])
def test_arrays_of_other_dimensions(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, "u2"))
    with pytest.raises(SourceError, match=r"expected \(y, x\)"):
        one(tmp_path / "a.npy")


def test_fortran_order_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 5), "u2", order="F"))
    with pytest.raises(SourceError, match="ascontiguousarray"):
        one(tmp_path / "a.npy")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}, {}]], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="pixels of type object"):
        one(tmp_path / "a.npy")


def test_masks_become_bytes(tmp_path: Path) -> None:
    data = np.arange(24).reshape(2, 3, 4) % 3 == 0
    np.save(tmp_path / "a.npy", data)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = data
    for path in sorted(tmp_path.iterdir()):
        frames = read_frames(one(path), 0, 2)
        assert frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, data)


def test_pages_that_disagree_need_a_choice(write: SimpleNamespace, tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(write.movie(3), photometric="minisblack")
        file.write(write.movie(2, (30, 40)), photometric="minisblack")
    with pytest.raises(SourceError, match=r"pages disagree.*\(3, 12, 20\).*\(2, 30, 40\).*source\.dataset"):
        one(tmp_path / "a.tif")
    described = one(tmp_path / "a.tif", dataset="1")
    np.testing.assert_array_equal(read_frames(described, 0, 2), write.movie(2, (30, 40)))


def test_a_lone_channel_axis_is_time_and_said_so(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(7)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True)  # tifffile then writes 7 channels
    described = one(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_frames(described, 0, 7), data)
    assert "channel (CYX) is taken as time" in described.notes[0]
    tifffile.imwrite(tmp_path / "b.tif", data.reshape(1, 7, 1, 12, 20).repeat(2, 2), imagej=True)
    with pytest.raises(SourceError, match="channels"):
        one(tmp_path / "b.tif")


def test_tiled_tiff(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(4, (40, 50))
    tifffile.imwrite(tmp_path / "a.tif", data, tile=(16, 16), photometric="minisblack")
    np.testing.assert_array_equal(read_frames(one(tmp_path / "a.tif"), 1, 4), data[1:])


def test_truncated_compressed_tiff(write: SimpleNamespace, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 2**16, (6, 64, 64)).astype("u2")
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for frame in data:
            file.write(frame, compression="zlib", contiguous=False, metadata=None)
    write.cut(path, -int(1.5 * data[0].nbytes))
    with pytest.raises(SourceError, match="last good frame is 3 "):
        one(path)
    described = one(path, on_error="quarantine")
    whole = sum(described.good_frames)
    assert whole == 4
    np.testing.assert_array_equal(read_frames(described, 0, whole), data[:whole])


def test_ome_times_of_every_plane(write: SimpleNamespace, tmp_path: Path) -> None:
    planes = {"DeltaT": [0.0, 250.0, 900.0], "DeltaTUnit": ["ms"] * 3}
    metadata = {"axes": "TYX", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "Å", "PhysicalSizeY": 0.2,
                "PhysicalSizeYUnit": "Å", "Plane": planes}  # fmt: skip
    tifffile.imwrite(tmp_path / "a.ome.tif", write.movie(3), metadata=metadata, photometric="minisblack")
    described = one(tmp_path / "a.ome.tif", sampling=None, frame_interval=None)
    np.testing.assert_allclose(described.time, [0, 0.25, 0.9])
    assert described.sampling == pytest.approx(0.2)


def test_ome_reciprocal_unit_is_not_taken_for_micrometres(write: SimpleNamespace, tmp_path: Path) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "1/nm", "PhysicalSizeY": 0.2,
                "PhysicalSizeYUnit": "1/nm"}  # fmt: skip
    xml = tifffile.OmeXml()
    xml.addimage("uint16", (12, 20), (1, 1, 1, 12, 20, 1), **metadata)
    text = xml.tostring().encode()
    tifffile.imwrite(tmp_path / "a.ome.tif", write.movie(1)[0], description=text, metadata=None)
    with pytest.raises(SourceError, match="reciprocal"):
        one(tmp_path / "a.ome.tif", sampling=None)


def test_zarr_groups_with_several_arrays(write: SimpleNamespace, tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for name in ("raw", "dark"):
        group.create_array(f"detector/{name}", data=write.movie(3, seed=len(name)))
    with pytest.raises(SourceError, match=r"detector/dark \(3, 12, 20\); detector/raw"):
        one(tmp_path / "a.zarr")
    described = one(tmp_path / "a.zarr", dataset="detector/raw")
    np.testing.assert_array_equal(read_frames(described, 0, 3), write.movie(3, seed=3))


def test_ome_metadata_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.attrs["multiscales"] = [{"datasets": [{"path": "../b.zarr"}]}]
    with pytest.raises(SourceError, match="out of the store"):
        one(tmp_path / "a.zarr")


def test_a_damaged_zarr_chunk_is_named(write: SimpleNamespace, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=write.movie(4), chunks=(1, 12, 20))
    (tmp_path / "a.zarr" / "c" / "2" / "0" / "0").write_bytes(b"rubbish")
    described = one(tmp_path / "a.zarr")
    with pytest.raises(SourceError, match="frames 2 to 2 cannot be decoded"):
        read_frames(described, 2, 3)
    np.testing.assert_array_equal(read_frames(described, 0, 2), write.movie(2))


def test_velox_without_any_time(write: SimpleNamespace, tmp_path: Path) -> None:
    path = write.velox(tmp_path / "a.emd", {"Ceta": write.movie(3)}, pixel=2e-11, frame_time=None)
    with pytest.raises(SourceError, match="no frame times"):
        one(path, frame_interval=None)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_surface_as_a_bug(seed: int, write: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data = write.movie(4)
    axes = [("t", "s", np.arange(4.0)), ("y", "nm", np.arange(12.0)), ("x", "nm", np.arange(20.0))]
    paths = [
        write.dm4(tmp_path / "a.dm4", data, [(1.0, "s"), (0.2, "Å"), (0.2, "Å")]),
        write.ser(tmp_path / "a_1.ser", data, 2e-11),
        write.mrc(tmp_path / "a.mrc", data),
        write.berkeley(tmp_path / "a.emd", data, axes),
        write.tvips(tmp_path, data, [4])[0],
    ]
    tifffile.imwrite(tmp_path / "a.tif", data, compression="zlib", photometric="minisblack")
    for path in (*paths, tmp_path / "a.tif"):
        content = bytearray(path.read_bytes())
        for at in rng.integers(0, min(len(content), 1500), 3):
            content[at] = rng.integers(0, 256)
        path.write_bytes(content[: rng.integers(0, len(content))] if seed % 2 else content)
        try:
            described = one(path, on_error="quarantine")
            read_frames(described, 0, min(described.shape[0], 4))
        except SourceError as error:
            assert path.name in str(error)


def test_frames_of_impossible_size(write: SimpleNamespace, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", write.movie(1)[0], compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        at = file.pages.first.tags["ImageLength"].valueoffset
    with (tmp_path / "a.tif").open("r+b") as raw:
        raw.seek(at)
        raw.write((0x70000000).to_bytes(4, "little"))
    with pytest.raises(SourceError, match=r"a\.tif"):
        one(tmp_path / "a.tif")


def test_a_file_that_vanished(tmp_path: Path) -> None:
    gone = tmp_path / "gone.mrc"
    with pytest.raises(SourceError, match=r"gone\.mrc: no such file"):
        describe(MovieFiles("gone", (gone,), "mrc"), SourceOverrides())
