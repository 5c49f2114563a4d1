"""Files, folders and globs become movies; what is passed over is listed; nothing leaves its folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
import zarr

from pipeline.ingest.describe import Description, SourceOverrides, describe
from pipeline.ingest.reading import read_frames, read_frames_flagged
from pipeline.ingest.sources import Discovery, MovieFiles, discover
from schemas.errors import SourceError

SET = SourceOverrides(sampling=0.2, frame_interval=0.5)
KEEP = SourceOverrides(sampling=0.2, frame_interval=0.5, on_error="quarantine")


def frames_of(folder: Path, data: np.ndarray, numbers: list[int], name: str = "frame_{}.tif") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(numbers, data, strict=True):
        tifffile.imwrite(folder / name.format(number), frame)


def reasons(found: Discovery) -> dict[str, str]:
    return {path.name: reason for path, reason in found.ignored}


def test_single_frames_of_a_folder_are_one_movie_in_natural_order(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(4)
    frames_of(tmp_path / "growth", data, [1, 2, 10, 11])
    (files,) = discover([tmp_path / "growth"]).movies
    assert files.name == "growth"
    assert [path.name for path in files.paths] == [f"frame_{i}.tif" for i in (1, 2, 10, 11)]
    described = describe(files, SET)
    np.testing.assert_array_equal(read_frames(described, 0, 4), data)
    np.testing.assert_array_equal(read_frames(described, 1, 3), data[1:3])
    assert [entry["frames"] for entry in described.files] == [1, 1, 1, 1]


def test_a_pattern_and_a_list_give_the_same_movie_as_the_folder(write: SimpleNamespace, tmp_path: Path) -> None:
    frames_of(tmp_path / "growth", write.movie(12), list(range(12)))
    by_folder = discover([tmp_path / "growth"])
    assert discover([str(tmp_path / "growth" / "*.tif")]) == by_folder
    assert discover([str(tmp_path / "**" / "*.tif")]) == by_folder
    listed = sorted((tmp_path / "growth").glob("*.tif"), reverse=True)
    assert discover(listed) == by_folder
    assert discover([*listed, tmp_path / "growth"]) == by_folder


def test_a_pattern_of_folders_is_one_movie_per_folder(write: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("run_2", "run_10"):
        frames_of(tmp_path / name, write.movie(3), [1, 2, 3])
    found = discover([str(tmp_path / "run_*")])
    assert [(files.name, len(files.paths)) for files in found.movies] == [("run_2", 3), ("run_10", 3)]


def test_multi_frame_files_are_one_movie_each(write: SimpleNamespace, tmp_path: Path) -> None:
    frames_of(tmp_path, write.movie(2), [1, 2])
    np.save(tmp_path / "run_10.npy", write.movie(3))
    np.save(tmp_path / "run_9.npy", write.movie(4))
    found = discover([tmp_path])
    assert [(files.name, len(files.paths)) for files in found.movies] == [
        (tmp_path.name, 2),
        ("run_9", 1),
        ("run_10", 1),
    ]


def test_one_movie_per_folder_and_reader(write: SimpleNamespace, tmp_path: Path) -> None:
    frames_of(tmp_path / "both", write.movie(2), [1, 2])
    for i, frame in enumerate(write.movie(2)):
        np.save(tmp_path / "both" / f"{i}.npy", frame)
    assert sorted(files.name for files in discover([tmp_path / "both"]).movies) == ["both_npy", "both_tiff"]


def test_the_rest_is_listed_with_a_reason(write: SimpleNamespace, tmp_path: Path) -> None:
    write.ser(tmp_path / "image_1.ser", write.movie(2), 2e-11)
    for name in ("image.emi", "lost.emi", "notes.txt", "truth.json", ".hidden.tif", "README"):
        (tmp_path / name).write_text("")
    (tmp_path / "deeper").mkdir()
    found = discover([tmp_path])
    assert [files.name for files in found.movies] == ["image_1"]
    told = reasons(found)
    assert told["image.emi"] == "metadata of image_1.ser"
    assert "lost_1.ser" in told["lost.emi"]
    assert "no reader for .txt" in told["notes.txt"]
    assert "no reader for .json" in told["truth.json"]
    assert told[".hidden.tif"] == "hidden"
    assert "without ending" in told["README"]
    assert "folder" in told["deeper"]


def test_naming_the_emi_file_means_its_series(write: SimpleNamespace, tmp_path: Path) -> None:
    write.ser(tmp_path / "image_1.ser", write.movie(1), 2e-11)
    xml = "<ObjectInfo><ExperimentalDescription><Root>"
    xml += "<Data><Label>High tension</Label><Value>80</Value><Unit>kV</Unit></Data>"
    xml += "<Data><Label>Mode</Label><Value>TEM {}</Value><Unit/></Data></Root></ExperimentalDescription></ObjectInfo>"
    (tmp_path / "image.emi").write_bytes(b"\0binary" + xml.format("SA").encode() + b"more")
    (files,) = discover([tmp_path / "image.emi"]).movies
    assert [path.name for path in files.paths] == ["image_1.ser"]
    assert describe(files, SourceOverrides()).energy == 80
    (tmp_path / "image.emi").write_bytes(xml.format("SA Diffraction").encode())
    with pytest.raises(SourceError, match="reciprocal"):
        describe(files, SourceOverrides())


@pytest.mark.parametrize("name", ["nothing.tif", "*.nothing", "folder/*.tif"])
def test_what_does_not_exist_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no such file|no file matches"):
        discover([tmp_path / name])


def test_a_near_name_is_offered(write: SimpleNamespace, tmp_path: Path) -> None:
    np.save(tmp_path / "movie_7.npy", write.movie(2))
    with pytest.raises(SourceError, match=r"Did you mean 'movie_7\.npy'"):
        discover([tmp_path / "movie7.npy"])


def test_links_cannot_lead_out_of_the_folder(write: SimpleNamespace, tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", write.movie(2))
    inside = tmp_path / "given"
    inside.mkdir()
    np.save(inside / "own.npy", write.movie(3))
    (inside / "alias.npy").symlink_to(inside / "own.npy")
    (inside / "leak.npy").symlink_to(tmp_path / "secret.npy")
    (inside / "up").symlink_to(tmp_path)
    for pattern in (inside, str(inside / "*.npy"), str(inside / "*" / "secret.npy")):
        found = discover([pattern])
        assert not any("secret" in str(path.resolve()) for files in found.movies for path in files.paths)
    told = reasons(discover([inside]))
    assert "leads out of" in told["leak.npy"]
    assert len(discover([inside]).movies) == 1  # the alias is the same file
    assert len(discover([inside / "leak.npy"]).movies) == 1  # named by the user


def test_hdf5_links_cannot_lead_out_of_the_folder(write: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("outside.h5", "given/beside.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = write.movie(3)
    path = tmp_path / "given" / "master.h5"
    with h5py.File(path, "w") as file:
        file["leak"] = h5py.ExternalLink("../outside.h5", "/data")
        file["fine"] = h5py.ExternalLink("beside.h5", "/data")
    with pytest.raises(SourceError, match="out of its folder"):
        describe(MovieFiles("master", (path,), "hdf5"), SourceOverrides(0.2, 0.5, dataset="leak"))
    described = describe(MovieFiles("master", (path,), "hdf5"), SourceOverrides(0.2, 0.5, dataset="fine"))
    np.testing.assert_array_equal(read_frames(described, 0, 3), write.movie(3))


def test_several_datasets_need_a_choice(write: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["first/data"], file["second/data"] = write.movie(3, seed=1), write.movie(4, seed=2)
    (files,) = discover([path]).movies
    with pytest.raises(SourceError, match=r"Set source\.dataset to one of: first/data \(3, 12, 20\); second/data"):
        describe(files, SET)
    with pytest.raises(SourceError, match="no image dataset 'third'"):
        describe(files, SourceOverrides(dataset="third"))
    described = describe(files, SourceOverrides(0.2, 0.5, dataset="/second/data"))
    np.testing.assert_array_equal(read_frames(described, 0, 4), write.movie(4, seed=2))


def test_detectors_of_a_velox_file_need_a_choice(write: SimpleNamespace, tmp_path: Path) -> None:
    detectors = {"HAADF": write.movie(3, seed=1), "BF": write.movie(3, seed=2)}
    path = write.velox(tmp_path / "a.emd", detectors, pixel=2e-11)
    (files,) = discover([path]).movies
    with pytest.raises(SourceError, match=r"HAADF.*BF"):
        describe(files, SourceOverrides())
    described = describe(files, SourceOverrides(dataset="BF"))
    assert described.detector == "BF"
    np.testing.assert_array_equal(read_frames(described, 0, 3), detectors["BF"])


def test_our_own_stack_is_recognised(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "movie.zarr", mode="w", attributes={"colonnade": {"kind": "stack"}})
    group.create_array("counts", shape=(2, 3, 3), dtype="u2")
    (files,) = discover([tmp_path]).movies
    assert (files.name, files.reader) == ("movie", "stack")
    with pytest.raises(SourceError, match="already a stack"):
        describe(files, SourceOverrides())


def test_later_parts_of_a_recording_alone(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6)
    paths = write.tvips(tmp_path, data, [2, 2, 2])
    (files,) = discover([paths[0]]).movies
    assert files == discover([tmp_path]).movies[0]
    assert (files.name, files.paths) == ("run", tuple(paths))
    np.testing.assert_array_equal(read_frames(describe(files, SET), 1, 5), data[1:5])
    for later in paths[1:]:
        (alone,) = discover([later]).movies
        with pytest.raises(SourceError, match="name part 000"):
            describe(alone, SET)
    paths[1].unlink()
    (gap,) = discover([tmp_path]).movies
    with pytest.raises(SourceError, match=r"run_001\.tvips is not given"):
        describe(gap, SET)
    paths[0].unlink()
    (headless,) = discover([tmp_path]).movies
    with pytest.raises(SourceError, match=r"run_000\.tvips is not given"):
        describe(headless, SET)


def test_members_must_agree(write: SimpleNamespace, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a_1.tif", write.movie(1)[0])
    tifffile.imwrite(tmp_path / "a_2.tif", write.movie(1, (30, 40))[0])
    (files,) = discover([tmp_path]).movies
    with pytest.raises(SourceError, match=r"a_2\.tif.*30 × 40 px uint16.*12 × 20 px uint16"):
        describe(files, KEEP)


def test_a_change_of_magnification_is_an_error(write: SimpleNamespace, tmp_path: Path) -> None:
    for i, sampling in enumerate((0.2, 0.2, 0.3)):
        write.mrc(tmp_path / f"{i}.mrc", write.movie(1), sampling)
    (files,) = discover([tmp_path]).movies
    with pytest.raises(SourceError, match=r"2\.mrc has 0\.3 Å/px, the first file 0\.2"):
        describe(files, SourceOverrides(frame_interval=0.5))


def test_a_damaged_member_costs_its_frame_only(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(5)
    frames_of(tmp_path, data, [1, 2, 3, 10, 20])
    (tmp_path / "frame_3.tif").write_bytes(b"II*\0" + b"\xff" * 50)
    write.cut(tmp_path / "frame_20.tif", -50)
    (files,) = discover([tmp_path]).movies
    assert len(files.paths) == 5
    with pytest.raises(SourceError, match=r"frame_3\.tif.*--on-error quarantine"):
        describe(files, SET)
    described = describe(files, KEEP)
    assert described.good_frames == (True, True, False, True, False)
    frames = read_frames(described, 0, 5)
    good = np.array(described.good_frames)
    np.testing.assert_array_equal(frames[good], data[good])
    assert not frames[~good].any()
    for start, stop in ((0, 3), (2, 3), (1, 5)):
        np.testing.assert_array_equal(read_frames(described, start, stop), frames[start:stop])
    assert sum("quarantined" in note for note in described.notes) == 2


def test_nothing_good_stays_an_error(write: SimpleNamespace, tmp_path: Path) -> None:
    frames_of(tmp_path, write.movie(2), [1, 2])
    for path in tmp_path.iterdir():
        write.cut(path, 30)
    for files in discover([tmp_path]).movies:
        with pytest.raises(SourceError, match="frame_"):
            describe(files, KEEP)


def test_damage_that_only_decoding_finds(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(4, (64, 64))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[2].dataoffsets[0]
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 40)
    (files,) = discover([path]).movies
    described = describe(files, KEEP)
    with pytest.raises(SourceError, match=r"a\.tif: frame 2 cannot be decoded"):
        read_frames(described, 0, 4)
    frames, good = read_frames_flagged(described, 1, 4)
    assert good.tolist() == [True, False, True]
    np.testing.assert_array_equal(frames[[0, 2]], data[[1, 3]])


def test_frames_never_written_to_hdf5(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = file.create_dataset("data", shape=data.shape, dtype=data.dtype, chunks=(2, 12, 20))
        stored[:4] = data[:4]
    (files,) = discover([tmp_path]).movies
    with pytest.raises(SourceError, match=r"last good frame is 3 .*never written"):
        describe(files, SET)
    assert describe(files, KEEP).good_frames == (True, True, True, True, False, False)


def focal(path: Path, **more: object) -> Description:
    (files,) = discover([path]).movies
    return describe(files, SourceOverrides(sampling=0.2, **more))  # type: ignore[arg-type]


def test_focal_series_of_consecutive_frames(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6)
    np.save(tmp_path / "a.npy", data)
    described = focal(tmp_path / "a.npy", frame_interval=0.5, defocus=[-50.0, 0.0, 50.0])
    assert described.axes == ("time", "defocus", "y", "x")
    assert described.shape == (2, 3, 12, 20)
    assert described.defocus == (-50.0, 0.0, 50.0)
    assert described.time == (0.0, 1.5)
    np.testing.assert_array_equal(read_frames(described, 0, 2), data.reshape(2, 3, 12, 20))
    np.testing.assert_array_equal(read_frames(described, 1, 2), data.reshape(2, 3, 12, 20)[1:])
    with pytest.raises(SourceError, match="6 frames, which do not divide into focal series of 4"):
        focal(tmp_path / "a.npy", frame_interval=0.5, defocus=[1.0, 2.0, 3.0, 4.0])
    one_point = focal(tmp_path / "a.npy", defocus=list(range(6)))
    assert (one_point.shape, one_point.time) == ((1, 6, 12, 20), (0.0,))


def test_focal_series_with_an_axis_of_its_own(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6).reshape(2, 3, 12, 20)
    np.save(tmp_path / "a.npy", data)
    tifffile.imwrite(tmp_path / "b.tif", data, imagej=True, metadata={"axes": "TZYX"})
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SourceError, match="needs 3 defoci, none is known"):
            focal(path, frame_interval=0.5)
        with pytest.raises(SourceError, match="needs 3 defoci, 2 are given"):
            focal(path, frame_interval=0.5, defocus=[1.0, 2.0])
        described = focal(path, frame_interval=0.5, defocus=[10.0, 20.0, 30.0])
        assert described.time == (0.0, 0.5)
        np.testing.assert_array_equal(read_frames(described, 0, 2), data)
        np.testing.assert_array_equal(read_frames(described, 1, 2), data[1:])


def test_focal_series_described_by_the_file(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6).reshape(2, 3, 12, 20)
    axes = [("time", "s", np.array([0.0, 2.0])), ("defocus", "nm", np.array([-5.0, 0.0, 5.0]))]
    axes += [("y", "nm", 0.02 * np.arange(12)), ("x", "nm", 0.02 * np.arange(20))]
    (files,) = discover([write.berkeley(tmp_path / "a.emd", data, axes)]).movies
    described = describe(files, SourceOverrides())
    assert described.defocus == pytest.approx((-50.0, 0.0, 50.0))
    assert described.time == (0.0, 2.0)
    assert described.energy == 300
    np.testing.assert_array_equal(read_frames(described, 1, 2), data[1:])
    damaged = focal(tmp_path / "a.emd", defocus=[1.0, 2.0, 3.0])
    assert damaged.defocus == (1.0, 2.0, 3.0)


def test_a_truncated_focal_series_loses_whole_time_points(write: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, write.movie(6))
    write.cut(path, -10)
    described = focal(path, frame_interval=0.5, defocus=[0.0, 10.0], on_error="quarantine")
    assert described.good_frames == (True, True, False)


def test_colour_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16, 3), "u1"), photometric="rgb")
    np.save(tmp_path / "b.npy", np.zeros((4, 4), "c8"))
    for path, told in ((tmp_path / "a.tif", "colours"), (tmp_path / "b.npy", "complex numbers")):
        with pytest.raises(SourceError, match=told):
            focal(path)


def test_description_is_json(write: SimpleNamespace, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", write.movie(6))
    described = focal(tmp_path / "a.npy", frame_interval=0.5, defocus=[0.0, 10.0])
    assert Description.from_dict(json.loads(json.dumps(described.to_dict()))) == described


def test_frames_sorted_by_the_clock_into_folders(write: SimpleNamespace, tmp_path: Path) -> None:
    data = write.movie(6)
    top = tmp_path / "insitu_7"
    for i, frame in enumerate(data):
        folder = top / "Hour_00" / "Minute_00" / f"Second_{i // 2:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"insitu_7_Hour_00_Minute_00_Second_{i // 2:02d}_Frame_{i % 2:04d}.dm4"
        write.dm4(
            folder / name, frame, [(0.2, "Å"), (0.2, "Å")], {"DataBar": {"Acquisition Time (OS)": 1.3e17 + i * 5e6}}
        )
    (top / "insitu_7.log").write_text("")
    found = discover([top])
    assert found == Discovery(found.movies, ((top / "insitu_7.log", "no reader for .log"),))
    assert discover([str(top / "**" / "*.dm4")]).movies == found.movies
    (files,) = found.movies
    assert (files.name, len(files.paths)) == ("insitu_7", 6)
    described = describe(files, SourceOverrides())
    np.testing.assert_array_equal(read_frames(described, 0, 6), data)
    np.testing.assert_allclose(described.time, 0.5 * np.arange(6), atol=1e-4)
    np.testing.assert_array_equal(read_frames(described, 3, 5), data[3:5])
