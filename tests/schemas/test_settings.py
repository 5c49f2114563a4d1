"""Settings: every problem is told at once, with its line and the nearest name; nothing is documented and unused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from schemas.errors import SettingsError
from schemas.jobfile import flatten, load_job, parse_overrides, settings_for, template, validate
from schemas.settings import Job, MovieEntry, Settings

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "movies:\n  - source: a.tif\noutput: out\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(SettingsError) as caught:
        load_job(write(tmp_path, text), overrides)
    return str(caught.value)


def sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Settings.model_fields.items()}  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- problems


def test_all_problems_are_told_at_once_with_lines_and_nearest_names(tmp_path: Path) -> None:
    text = MINIMAL + (
        "source:\n"
        "  samplng: 0.2\n"
        "  frame_interval: -1\n"
        "  region: [5, 5, 0, 9]\n"
        "denoise:\n"
        "  steps: many\n"
        "sgment: {}\n"
        "columns: {threshold: 2}\n"
    )
    told = problems(tmp_path, text)
    assert "6 problem(s)" in told
    assert "line 5: source.samplng is not a setting; did you mean 'sampling'?" in told
    assert re.search(r"line 6: source\.frame_interval: .*greater than 0 \(found -1\)", told)
    assert "line 7: source.region: region [5, 5, 0, 9] is empty; expected [y0, y1, x0, x1]" in told
    assert re.search(r"line 9: denoise\.steps: .*integer.* \(found 'many'\)", told)
    assert "line 10: sgment is not a setting; did you mean 'segment'?" in told
    assert re.search(r"line 11: columns\.threshold: .* \(found 2\)", told)


def test_a_name_near_nothing_is_answered_with_all_names(tmp_path: Path) -> None:
    told = problems(tmp_path, MINIMAL + "species: {qqqq: 1}\n")
    assert "line 4: species.qqqq is not a setting; expected one of: " in told


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    told = problems(tmp_path, "movies:\n  - name: a\n")
    assert "line 2: movies.0.source is missing" in told
    assert "output is missing" in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds NoneType; expected settings"),
        ("- a\n", "holds list; expected settings"),
        ("a: [", "is not valid YAML"),
        ("movies: []\noutput: x\n", "movies is empty"),
        (MINIMAL + "output: other\n", "line 4: output is set twice; keep one"),
        (MINIMAL + "drift:\n  correct: true\n  correct: false\n", "line 6: drift.correct is set twice"),
        (MINIMAL + "drift: !!python/object/apply:os.system ['echo']\n", "is not valid YAML"),
        (
            "movies:\n  - source: a.tif\n    name: ../b\noutput: x\n",
            "line 3: movies.0.name: name '../b' cannot",
        ),
        ("movies:\n  - source: a.tif\n    name: .b\noutput: x\n", "cannot be a file name"),
    ],
)
def test_files_that_are_no_job_are_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in problems(tmp_path, text)


def test_an_absent_file_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read .*colonnade init"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", [0, -0.2, float("nan"), "wide", [1]])
def test_sampling_must_be_a_positive_number(value: Any) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"source": {"sampling": value}})


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Settings().drift.correct = False  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "source: {sampling: 0.1, energy: 80}\n")
    job = load_job(path, ["source.sampling=0.2", "images.save=[denoised]", "denoise.weights=pretrained"])
    assert (job.source.sampling, job.source.energy) == (0.2, 80.0)
    assert job.images.save == ("denoised",)
    assert job.denoise.weights == "pretrained"


def test_none_means_nothing_where_nothing_is_allowed(tmp_path: Path) -> None:
    items = ["segment.window=none", "denoise.tile=null", "lowpass.cutoff=none", "denoise.network=none"]
    job = load_job(write(tmp_path, MINIMAL), items)
    assert (job.segment.window, job.denoise.tile, job.lowpass.cutoff) == (None, None, None)
    assert job.denoise.network == "none"
    assert "denoise.steps" in problems(tmp_path, MINIMAL, ("denoise.steps=none",))


def test_overrides_accumulate_in_order() -> None:
    assert parse_overrides(["a.b=1", "a.c=[x, y]", "a.b=2"]) == {"a": {"b": 2, "c": ["x", "y"]}}


@pytest.mark.parametrize("item", ["source.sampling", "=3", "a.b=[", "  =x"])
def test_overrides_that_are_none_are_shown(item: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(repr(item))):
        parse_overrides([item])


def test_an_override_of_nothing_is_an_unknown_key(tmp_path: Path) -> None:
    assert "segment.windw is not a setting; did you mean 'window'?" in problems(
        tmp_path, MINIMAL, ("segment.windw=256",)
    )


# --------------------------------------------------------------------------------------------------- several movies


def test_movies_have_settings_of_their_own(tmp_path: Path) -> None:
    text = (
        "movies:\n  - source: a.tif\n  - source: [b.tif, c.tif]\n    set: {source.sampling: 0.3, denoise: {steps: 7}}\n"
        "output: out\nsource: {sampling: 0.1}\n"
    )
    job = load_job(write(tmp_path, text))
    first, second = (settings_for(job, entry) for entry in job.movies)
    assert (first.source.sampling, first.denoise.steps) == (0.1, Settings().denoise.steps)
    assert (second.source.sampling, second.denoise.steps) == (0.3, 7)
    assert job.movies[1].source == (str(tmp_path / "b.tif"), str(tmp_path / "c.tif"))


def test_wrong_settings_of_a_movie_are_told_with_its_line(tmp_path: Path) -> None:
    text = (
        "movies:\n  - source: a.tif\n    set: {source.samplin: 1}\n"
        "  - source: b.tif\n    set: {drift.lags: x}\noutput: o\n"
    )
    told = problems(tmp_path, text)
    assert "2 problem(s)" in told
    assert "line 2: movies.0.set: source.samplin is not a setting; did you mean 'sampling'?" in told
    assert "line 4: movies.1.set: drift.lags" in told


def test_paths_are_relative_to_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.safetensors").touch()
    text = (
        "movies:\n  - source: data/a.tif\n    set: {detector.dark: own.tif}\noutput: out\n"
        "detector: {gain: gain.tif, dark: /abs/dark.tif}\ndenoise: {weights: mine.safetensors}\n"
    )
    path = write(tmp_path, text)
    monkeypatch.chdir("/")
    job = load_job(path)
    assert job.movies[0].source == str(tmp_path / "data/a.tif")
    assert job.output == tmp_path / "out"
    assert (job.detector.gain, job.detector.dark) == (tmp_path / "gain.tif", Path("/abs/dark.tif"))
    assert job.denoise.weights == str(tmp_path / "mine.safetensors")
    assert job.segment.model == Settings().segment.model
    assert settings_for(job, job.movies[0]).detector.dark == tmp_path / "own.tif"


# ---------------------------------------------------------------------------------------------------------- template


def test_the_template_loads_and_equals_the_defaults(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, template(["a b.tif", "*.dm4"])))
    assert job.model_dump(include=set(Settings.model_fields)) == Settings().model_dump()
    assert [Path(str(entry.source)).name for entry in job.movies] == ["a b.tif", "*.dm4"]


def test_the_template_with_every_line_set_still_equals_the_defaults(tmp_path: Path) -> None:
    text = re.sub(r"^  # (\w+: )", r"  \1", template(), flags=re.MULTILINE)
    data = yaml.safe_load(text)
    assert {name for name in Settings.model_fields if isinstance(data[name], dict)} == set(Settings.model_fields)
    job = load_job(write(tmp_path, text))
    assert job.model_dump(include=set(Settings.model_fields)) == Settings().model_dump()


def test_every_example_job_loads() -> None:
    examples = [p for folder in ("docs", "examples", "README.md") for p in (ROOT / folder).rglob("*.yaml")]
    for path in examples:
        load_job(path)
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for block in blocks:
        data = yaml.safe_load(block)
        if "movies" in data:
            validate({"output": "x", **data})


# ------------------------------------------------------------------------------------------- documented, and used


@pytest.mark.parametrize("section", sections())
def test_every_setting_is_documented(section: str) -> None:
    for name, field in sections()[section].model_fields.items():
        assert field.description, f"{section}.{name}"
    for model in (Job, MovieEntry):
        assert all(field.description or name in Settings.model_fields for name, field in model.model_fields.items())


@pytest.mark.parametrize("section", sections())
def test_every_setting_is_used(section: str) -> None:
    code = "\n".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")))
    for name in sections()[section].model_fields:
        assert re.search(rf"\.{name}\b", code) or f'"{name}"' in code, f"{section}.{name} is read nowhere"


def test_lengths_times_and_energies_name_their_unit() -> None:
    for section, names in {"source": ["sampling", "frame_interval", "energy", "defocus"], "columns": ["width"]}.items():
        for name in names:
            assert re.search(r"Å|second|keV", sections()[section].model_fields[name].description or ""), name


def test_flat_names_are_unique() -> None:
    flat = flatten(Settings().model_dump())
    assert flat["source.binning"] == 1
    assert len(flat) == sum(len(model.model_fields) for model in sections().values())
