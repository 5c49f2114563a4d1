"""A report holds the numbers of its run, needs nothing else, and shows foreign text as text."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import store
from pipeline.images import create_image, write_image
from pipeline.layout import stack_layout
from pipeline.results import montage, summary
from pipeline.results.examples import Example, examples
from pipeline.results.figures import thin
from pipeline.results.open import open_run, to_detector
from pipeline.results.report import report
from schemas.errors import SchemaError, SettingsError
from schemas.frames import FRAMES

WriteLedger = Callable[[Path, str, list[dict[str, Any]]], Path]


class Page(HTMLParser):
    """What a page says, and all that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def references(self) -> list[str]:
        names = ("src", "href", "srcset", "xlink:href", "data", "action", "poster")
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in names]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def _page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


LEDGER: list[dict[str, Any]] = [
    {"kind": "plan", "blocks": {"process": 3}},
    {"kind": "block", "step": "process", "start": 0, "stop": 3, "fingerprint": "f", "status": "done",
     "seconds": {"read": 1.0, "denoise": 3.0}, "time": "2026-03-01T12:00:04+00:00"},
    {"kind": "block", "step": "process", "start": 3, "stop": 5, "fingerprint": "f", "status": "done",
     "seconds": {"read": 1.0, "denoise": 3.0}, "time": "2026-03-01T12:00:08+00:00"},
    {"kind": "block", "step": "process", "start": 5, "stop": 6, "fingerprint": "f", "status": "failed",
     "reason": "RuntimeError: <b>no</b> luck", "worker": "tcp://w", "time": "2026-03-01T12:00:09+00:00"},
]  # fmt: skip


def test_the_report_holds_the_numbers(run_path: Path, write_ledger: WriteLedger) -> None:
    write_ledger(run_path.parent, "movie", LEDGER)
    out = report(run_path)
    assert out == run_path.with_suffix(".html")
    page = _page(out)
    for words in (
        "6 frames over 2.5 s.",  # the story
        "columns found 10",
        "0–5 per frame, median 2.5",
        "200 e⁻/Å²",
        "dropped all-zero frame",  # frame 2
        "not computed nothing has been computed for the frame yet",  # frame 5
        "process frame 5 failed RuntimeError: <b>no</b> luck",
        "process denoise 6.0 s 75.0 %",
        "8.0 s of work in all, 8.0 s from the first block to the last: 0.5 frames/s",
        "movie.tif 6 1.23 blake2b:abcdef",  # provenance
        "denoise.steps 77",
        "blindspot-small",
        "torch 2.13",
        "the dose is uncalibrated",  # notes of the run
        "Au 10 100.0 %",
        "Frame 3, 1.5 s: ",
    ):
        assert words in page.text, words


def test_the_headline_agrees_with_the_run(run_path: Path) -> None:
    run = open_run(run_path)
    series = summary.frame_series(run)
    columns = summary.column_summary(run)
    spread = {row.name: row for row in summary.statistics(series)}
    assert columns.rows == 10
    assert columns.probability.sum() == columns.error_x.sum() == columns.error_y.sum() == 10
    assert 0.03 <= columns.median_error() <= 0.0425  # 0.03 and 0.04 Å, to a bin of 6 %
    assert spread["drift since the first frame"].most == pytest.approx(np.hypot(0.3, 0.7) * 2.0)
    assert spread["drift from frame to frame"].median == pytest.approx(np.hypot(0.3, 0.7) * 0.5)
    assert (spread["columns"].least, spread["columns"].most) == (0, 5)
    assert summary.flagged(series) == [(2, 3, "dropped", "all-zero frame"), (5, 6, "not_computed", "")]


def test_the_page_needs_nothing_else(run_path: Path) -> None:
    raw = report(run_path).read_text(encoding="utf-8")
    page = Page(raw)
    assert page.references()
    assert all(reference.startswith("data:image/") for reference in page.references())
    assert not {"script", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert "url(" not in raw
    assert "@import" not in raw
    assert not re.search(r"https?://", raw)
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:")


def test_the_page_can_be_read_by_everyone(run_path: Path) -> None:
    raw = report(run_path).read_text(encoding="utf-8")
    page = Page(raw)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.all("img"))
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in page.all("svg"))
    assert len(page.all("picture")) == len(page.all("source")) == 5
    assert all("dark" in (source["media"] or "") for source in page.all("source"))
    assert all(cell.get("scope") == "col" for cell in page.all("th"))
    assert "@media print" in raw
    assert "prefers-color-scheme: dark" in raw


def test_foreign_text_is_shown_as_text(make_run: Callable[..., Path], write_ledger: WriteLedger) -> None:
    attack = "<script>alert('x')</script><img src=x onerror=alert(1)>"
    path = make_run(
        "movie",
        movie=attack,
        notes=[attack],
        sources=[{"path": f"/data/{attack}.tif", "size": 1, "hash": attack, "frames": 6}],
        versions={attack: attack},
        models={attack: {attack: attack}},
        prepare={attack: [attack]},
        settings={"source": {attack: attack}},
        plan={attack: attack},
        state=attack,
    )
    write_ledger(path.parent, "movie", [{**record, "reason": attack, "worker": attack} for record in LEDGER])
    page = _page(report(path))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert page.text.count("alert('x')") >= 10


def test_text_in_figures_is_no_formula(make_run: Callable[..., Path]) -> None:
    path = make_run()
    group = path / "frames" / "species_class"
    shutil.rmtree(group)
    frames = {name: open_run(make_run("other"))[f"frames/{name}"].values for name in FRAMES.required}
    frames["species_count"][:, 1] = 2
    classes = {"species_class": ["$\\frac{", "<&>"]}
    store.create_table(path, FRAMES, 6, sizes={"species_class": 2}, coordinates=classes)
    store.write_rows(path, FRAMES, 0, frames)
    assert "$\\frac{ 10" in _page(report(path)).text


def test_a_run_in_progress_says_so(make_run: Callable[..., Path], write_ledger: WriteLedger) -> None:
    path = make_run(state="running")
    write_ledger(path.parent, "movie", [*LEDGER, {"kind": "failure", "step": "adapt", "reason": "ValueError: oops"}])
    text = _page(report(path)).text
    assert "This run is not finished (state: running). 4 of 6 frames are measured." in text
    assert "1 block failed" in text
    assert "The last attempt stopped in adapt: ValueError: oops" in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store.create_run(tmp_path / "new.zarr", {"movie": "new"})
    text = _page(report(tmp_path / "new.zarr")).text
    assert "Nothing has been computed yet." in text
    assert "no ledger beside this run" in text


@pytest.mark.parametrize("rows", [1, 5])
def test_a_run_whose_tables_are_not_written(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "new.zarr"
    store.create_run(path, {"movie": "new"})
    store.create_table(path, FRAMES, rows, sizes={"species_class": 1}, coordinates={"species_class": ["unknown"]})
    text = _page(report(path)).text
    assert f"0 of {rows} frames are measured." in text
    assert "columns found 0" in text
    assert "nothing has been computed for the frame yet" in text


@pytest.mark.parametrize("counts", [(4,), (0, 0), (-1, -1, -1), (-1,), (0,)])
def test_odd_movies_have_reports(make_run: Callable[..., Path], counts: tuple[int, ...]) -> None:
    path = make_run(counts=counts)
    shutil.rmtree(path / "examples")
    text = _page(report(path)).text
    total = sum(max(count, 0) for count in counts)
    assert f"columns found {total}" in text
    assert "The run holds no example frames." in text


def test_a_folder_gets_an_index(make_run: Callable[..., Path], write_ledger: WriteLedger, tmp_path: Path) -> None:
    make_run("a & b")
    make_run("c", counts=(1, 2), state="running")
    bad = [{"kind": "movie", "status": "quarantined", "reason": "bad.dm4 is truncated: last good frame 17"}]
    write_ledger(tmp_path, "bad", bad)
    newer = make_run("newer")
    store.update_run(newer, {"schema_version": 99})
    out = report(tmp_path)
    assert out == tmp_path / "index.html"
    page = _page(out)
    assert page.references() == ["a%20%26%20b.html", "c.html"]
    assert "movies 4 1 complete" in page.text
    assert "frames measured 6 of 8" in page.text
    assert "quarantined: bad.dm4 is truncated: last good frame 17" in page.text
    assert "schema_version 99" in page.text
    assert [link["href"] for link in _page(tmp_path / "c.html").all("a")] == ["index.html"]


def test_pages_go_where_they_are_wanted(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run()
    assert report(path, tmp_path / "pages" / "one.html") == tmp_path / "pages" / "one.html"
    assert report(tmp_path, tmp_path / "all" / "start.html").exists()
    assert (tmp_path / "all" / "movie.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no run"):
        report(tmp_path)
    with pytest.raises(SchemaError, match="does not exist"):
        report(tmp_path / "absent.zarr")


# ------------------------------------------------------------------------------------------- pictures


def test_markers_lie_on_the_columns(run_path: Path) -> None:
    """The centre of pixel (0, 0) is at 0.5, the crop begins at 1 Å, and drift is put back."""
    run = open_run(run_path)
    example = list(examples(run))[1]
    assert example.frame == 3
    columns = to_detector(run, run["columns"].to_dataset().isel(column=slice(3, 8)))
    y, x = columns["y_detector"].values, columns["x_detector"].values
    expected = np.stack([(y - 1.0) / 0.2, (x - 1.0) / 0.2], axis=1)
    inside = ((expected > -0.5) & (expected < [39.5, 47.5])).all(axis=1)
    assert inside.any()
    assert np.allclose(example.points, expected[inside])
    circles = re.findall(
        r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', montage.example_figure(example, magnified=False, colours={})
    )
    assert np.allclose([(float(cy), float(cx)) for cx, cy in circles], expected[inside] + 0.5, atol=0.006)


def test_species_have_colours_of_their_own_where_there_are_several(run_path: Path) -> None:
    (example,) = list(examples(open_run(run_path), [3]))
    assert set(example.species) == {"Au"} and montage.colours_of([example]) == {}
    mixed = dataclasses.replace(example, species=np.array(["S", "Mo"] * len(example.points))[: len(example.points)])
    colours = montage.colours_of([example, mixed])
    assert list(colours) == ["Au", "Mo", "S"] and len(set(colours.values())) == 3
    drawn = montage.example_figure(mixed, magnified=False, colours=colours)
    strokes = re.findall(r'<circle [^>]*stroke="([^"]+)"', drawn)
    assert strokes == [colours[name] for name in mixed.species]


def test_example_pixels_are_the_stored_ones(run_path: Path) -> None:
    example = next(examples(open_run(run_path)))
    drawn = montage.example_figure(example, magnified=False, colours={})
    encoded = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn)
    assert len(encoded) == 4  # raw, denoised, difference, columns
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))), dtype=float)
    assert pixels.shape == (40, 48)
    assert np.corrcoef(pixels.ravel(), example.raw.ravel())[0, 1] > 0.98


def test_the_nearest_example_stands_in_for_a_frame(run_path: Path) -> None:
    run = open_run(run_path)
    assert [example.frame for example in examples(run, [4])] == [3]
    assert [example.frame for example in examples(run, [0, 1, 5])] == [0, 3]
    with pytest.raises(SettingsError, match="frame 6 is outside the movie; expected 0 to 5"):
        report(run_path, frames=[6])


def test_any_frame_can_be_shown_while_its_pixels_are_kept(run_path: Path) -> None:
    counts = np.random.default_rng(4).poisson(5, (6, 40, 48)).astype("uint16")
    stack = run_path.parent / "stacks" / "movie.zarr"
    layout = stack_layout(counts.shape, counts.dtype, shard_megabytes=1)
    common = {"sampling": 0.2, "origin": (1.0, 2.0)}
    store.create_stack(
        stack, shape=counts.shape, dtype=counts.dtype, time=np.arange(6.0), layout=layout,
        attributes={"sampling": 0.2}, **common,
    )  # fmt: skip
    store.write_frames(stack, 0, counts)
    store.finish_stack(stack, frame_ok=np.ones(6, dtype=bool), attributes={})
    create_image(
        run_path, "denoised", time=np.arange(6.0), shape=counts.shape, block_frames=6,
        **common,
    )  # fmt: skip
    write_image(run_path, "denoised", 0, counts * np.float32(2))
    run = open_run(run_path)
    chosen = list(examples(run, [4, 0], folder=run_path.parent))
    assert [example.frame for example in chosen] == [4, 0]
    assert np.array_equal(chosen[0].raw, counts[4])
    assert np.array_equal(chosen[0].denoised, counts[4] * 2)
    columns = to_detector(run, run["columns"].to_dataset().isel(column=slice(8, 10)))
    expected = np.stack([(columns["y_detector"] - 1) / 0.2, (columns["x_detector"] - 2) / 0.2], axis=1)
    inside = ((expected > -0.5) & (expected < [39.5, 47.5])).all(axis=1)
    assert np.allclose(chosen[0].points, expected[inside])
    assert "Frame 4, 2 s" in _page(report(run_path, frames=[4])).text


@pytest.mark.parametrize(
    ("width", "length"), [(43.5, 10.0), (9.6, 2.0), (14.0, 2.0), (15.0, 5.0), (200.0, 50.0), (0.5, 0.1), (3.0, 1.0)]
)
def test_scale_bars_are_round_and_short(width: float, length: float) -> None:
    assert montage.scale_length(width) == pytest.approx(length)
    assert 0.13 * width < length <= width / 3 + 1e-9


def test_the_scale_bar_is_calibrated(run_path: Path) -> None:
    """48 pixels of 0.2 Å are 9.6 Å: the bar of 2 Å is 10 pixels long."""
    drawn = montage.example_figure(next(examples(open_run(run_path))), magnified=False, colours={})
    assert re.findall(r'<rect [^>]*width="([\d.]+)"[^>]*class="bar"', drawn)[0] == "10.000"
    assert ">2 Å</text>" in drawn


def test_the_detail_is_inside_and_full_of_columns() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(150, 190, (30, 2)), [[10.0, 10.0]]])
    blank = np.zeros((200, 240), dtype=np.float32)
    example = Example(
        0,
        0.0,
        blank,
        blank,
        points,
        points * 0,
        np.full(len(points), "Au"),
        0.2,
        1.0,
        1.0,
        blank.astype(int),
        np.zeros(0),
    )
    window = montage.detail_window(example)
    assert window is not None
    y0, y1, x0, x1 = window
    assert (y1 - y0, x1 - x0) == (70, 70)
    assert 0 <= y0 < y1 <= 200
    assert 0 <= x0 < x1 <= 240
    assert ((points >= [y0, x0]) & (points < [y1, x1])).all(axis=1).sum() >= 27


def test_large_frames_are_averaged_down() -> None:
    image = np.zeros((1300, 1400), dtype=np.float32)
    image[:, 700:] = 1
    small = Image.open(io.BytesIO(montage._png(image)))
    assert small.size == (466, 433)
    assert np.asarray(small)[0, [0, -1]].tolist() == [0, 255]


def test_long_series_are_thinned_without_losing_peaks() -> None:
    numbers = np.zeros(10_000)
    numbers[4321], numbers[100:105] = 7.0, np.nan
    time, middle, least, most = thin(np.arange(10_000.0), numbers, bins=100)
    assert len(time) == 100
    assert np.nanmax(most) == 7.0
    assert np.nanmax(middle) == pytest.approx(0.07)
    assert np.nanmin(least) == 0.0
    same = thin(np.arange(5.0), np.arange(5.0), bins=100)
    assert all(np.array_equal(series, np.arange(5.0)) for series in same)


def test_particles_are_coloured_by_what_their_lattice_says() -> None:
    labels = np.zeros((20, 30), int)
    labels[2:8, 2:8], labels[2:8, 12:18], labels[12:18, 2:8] = 1, 2, 3
    flat, none = np.ones(labels.shape, np.float32), np.zeros((0, 2))
    example = Example(
        0, 0.0, flat, flat, none, none, np.zeros(0, str), 0.2, 1.0, 1.0, labels, np.array([1.0, 50.0, np.nan])
    )
    colours = montage._coloured(example)
    equal, unequal, unknown, outside = (colours[at] for at in ((4, 4), (4, 14), (14, 4), (19, 29)))
    assert equal[0] > equal[2] and unequal[2] > unequal[1]  # yellow and violet
    assert len(set(unknown)) == len(set(outside)) == 1 and unknown[0] > outside[0]  # white and grey


def test_particles_and_the_lattice_are_told(run_path: Path) -> None:
    text = _page(report(run_path)).text
    assert "particles found" in text and "8 2 per frame" in text  # two in each of the four measured frames
    assert "interpretable" in text
    assert "Fourier ratio" in text


def test_what_the_denoiser_took_away_is_shown_and_judged(run_path: Path) -> None:
    shown = next(examples(open_run(run_path)))
    # The counts of the run are Poisson of mean 8, denoised to 8, read out with half an electron squared.
    assert shown.residual is not None and shown.residual.std() == pytest.approx((8 / 8.5) ** 0.5, rel=0.05)
    text = _page(report(run_path)).text
    assert "difference 1.02 of the noise predicted and white (pixels nearby correlated by -0.010 at most)" in text
    assert 'aria-label="difference, frame 0, whole"' in montage.example_figure(shown, magnified=False, colours={})


def test_without_a_denoiser_nothing_was_taken_away(run_path: Path) -> None:
    shown = dataclasses.replace(next(examples(open_run(run_path))), residual=None, spread=float("nan"))
    assert "difference" not in montage.example_figure(shown, magnified=True, colours={})
