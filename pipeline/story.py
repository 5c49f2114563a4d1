"""The story of a job: every movie from files to a queryable store, resumably, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from distributed import Client

from pipeline import blocks, collect, graph, images, models, plan, store
from pipeline.collect import Piece
from pipeline.groups import Groups
from pipeline.ingest.describe import describe
from pipeline.ingest.to_stack import binned_dtype, calibration_of, open_ingested, plan_cut, write_stack
from pipeline.job import Engine, Outcome, PlannedMovie, Progress, Silent, movies_of, overrides_of
from pipeline.ledger import Lease, Ledger
from pipeline.movie import Lead, Task
from pipeline.parts import part_path, read_meta, sweep
from pipeline.patience import Stopped
from pipeline.provenance import describe_run
from schemas.errors import SchemaError, SettingsError, SourceError
from schemas.settings import Job, Settings

log = logging.getLogger("colonnade")

TASKS: Mapping[str, Callable[[Task], Mapping[str, Any]]] = {
    "calibrate": blocks.calibrate,
    "survey": blocks.survey,
    "drift": blocks.solve_drift,
    "adapt": blocks.adapt,
    "vote": blocks.vote,
    "process": blocks.process,
}


def run(
    job: Job,
    *,
    client: Client | None = None,
    device: str = "cpu",
    redo: str | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> list[Outcome]:
    """Process all movies of a job; finished work of an earlier run is used, unless ``redo`` names a step.

    ``client`` None computes everything in this process. Returns an outcome per movie; bad files are quarantined and
    the rest goes on. Anything else that goes wrong is raised: settings, site, or our bug.
    """
    movies, _ = movies_of(job)
    job.output.mkdir(parents=True, exist_ok=True)
    engine = Engine(job.output, client, device, stop or threading.Event(), progress or Silent())
    with Lease(job.output / "ledger") as lease, engine.pulse.beating(job.output / "ledger", client):
        engine.lease = lease
        for movie in movies:  # so that `colonnade status` knows of those that wait
            (job.output / "ledger" / movie.name).mkdir(exist_ok=True)
        sweep(job.output / name for name in ("ledger", "parts", "stacks", *(f"{movie.name}.zarr" for movie in movies)))
        return list(_side_by_side(engine, movies, Groups(movies), redo))


def _side_by_side(
    engine: Engine, movies: Sequence[PlannedMovie], groups: Groups, redo: str | None
) -> Iterator[Outcome]:
    """Run movies in threads of this process, which only wait: a short movie leaves no worker idle."""
    width = 1 if engine.client is None else min(len(movies), max(2, len(engine.client.nthreads())))
    if width <= 1:
        yield from (run_movie(engine, movie, redo, groups) for movie in movies)
        return
    with ThreadPoolExecutor(width, thread_name_prefix="movie") as pool:
        futures = [pool.submit(run_movie, engine, movie, redo, groups) for movie in movies]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
            # What stopped the others is not the error that matters.
            errors.sort(key=lambda error: isinstance(error, Stopped))
            if errors:
                raise errors[0]
        except BaseException:
            engine.stop.set()
            for future in futures:
                future.cancel()
            raise
    yield from (future.result() for future in futures)


def run_movie(engine: Engine, movie: PlannedMovie, redo: str | None = None, groups: Groups | None = None) -> Outcome:
    """Ingest, survey, prepare, process, collect one movie; a bad source quarantines it."""
    begin, groups = time.monotonic(), groups or Groups()
    ledger = Ledger(engine.output / "ledger" / movie.name, engine.lease)
    path = engine.output / f"{movie.name}.zarr"
    try:
        story = Story(engine, movie, ledger, ingest(engine, movie), redo, groups)
        story.survey()
        story.prepare()
        story.process()
        outcome = dataclasses.replace(story.collect(), seconds=time.monotonic() - begin)
        ledger.add("movie", status=outcome.status, reason="", seconds=round(outcome.seconds, 2))
        return outcome
    except (SourceError, SchemaError) as error:
        log.error("%s is quarantined: %s", movie.name, error)
        ledger.add("movie", status="quarantined", reason=str(error))
        return Outcome(movie.name, "quarantined", path, reason=str(error))
    finally:
        ledger.flush()
        groups.left(movie.name)


def ingest(engine: Engine, movie: PlannedMovie) -> store.Stack:
    """The movie's stack, written first if it is not there yet; a source that is a stack already is used in place."""
    settings = movie.settings
    if movie.files.reader == "stack":
        return open_ingested(movie.files.paths[0], settings.source)
    description = describe(movie.files, overrides_of(settings))
    target = engine.output / "stacks" / f"{movie.name}.zarr"
    target.parent.mkdir(parents=True, exist_ok=True)
    cut = plan_cut(description, settings.source)
    planes = len(description.defocus) if description.defocus else 1
    require_fit(movie, planes=planes, sampling=description.sampling * cut.binning)
    require_memory(engine, settings, cut.shape, binned_dtype(description.dtype, cut.binning).itemsize, planes)
    engine.progress.begin(movie.name, "ingest", cut.shape[0])
    write_stack(
        description, target, source=settings.source, stacks=settings.stacks, client=engine.client, stop=engine.stop,
        progress=lambda frames: engine.progress.advance(movie.name, "ingest", frames),
    )  # fmt: skip
    return store.open_stack(target)


def require_fit(movie: PlannedMovie, *, planes: int, sampling: float) -> None:
    """Refuse a movie that its networks were not trained for; the others of the job go on."""
    try:
        models.require_fit(movie.settings, planes=planes, sampling=sampling)
    except SettingsError as error:
        raise SourceError(str(error)) from None


def require_memory(engine: Engine, settings: Settings, shape: tuple[int, int, int], itemsize: int, planes: int) -> None:
    """Refuse a cluster whose workers are too small, before any work is sent."""
    size, halo = plan.block_frames(settings, shape), plan.denoiser_halo(settings)
    plan.require_memory(
        plan.predict_memory(settings, shape, itemsize, size, halo, planes),
        graph.smallest_memory(engine.client, engine.resources()),
    )


class Story:
    """One movie's way through the steps after ingest."""

    def __init__(
        self, engine: Engine, movie: PlannedMovie, ledger: Ledger, stack: store.Stack, redo: str | None, groups: Groups
    ) -> None:
        self.engine, self.movie, self.ledger, self.stack, self.groups = engine, movie, ledger, stack, groups
        size = plan.block_frames(movie.settings, stack.shape)
        # Tasks must agree on the cut, so they get it resolved.
        cut = movie.settings.blocks.model_copy(update={"frames": size})
        self.settings = movie.settings.model_copy(update={"blocks": cut})
        self.path = engine.output / f"{movie.name}.zarr"
        self.parts = engine.output / "parts" / movie.name
        facts = calibration_of(movie.settings, stack)
        content = str(stack.attributes["content_hash"])
        self._depends = functools.partial(plan.dependencies, movie.settings, content, facts)
        self.lead = groups.lead_of(movie.name, engine.stop)
        self.deps = self._depends(lead=self.lead.fingerprint if self.lead else "")
        self.keys = plan.fingerprints(self.deps)
        self.weights = models.hashes(movie.settings)
        self.task = Task(
            str(stack.path), str(self.path), str(self.parts), stack.shape[0], self.settings,
            tuple(self.keys.items()), engine.device, lead=self.lead,
        )  # fmt: skip
        require_fit(movie, planes=stack.planes, sampling=stack.sampling)
        require_memory(engine, movie.settings, stack.shape, stack.counts.dtype.itemsize, stack.planes)
        self._require_plane()
        leads = None if self.lead else Lead(movie.name, self.keys["adapt"], str(self._global_part("adapt")))
        groups.opened(movie.name, leads)
        if redo is not None:
            self._forget(plan.from_step(redo))
        self._note_plan()
        store.create_run(self.path, self.attributes("running"))

    def _require_plane(self) -> None:
        planes, plane = self.stack.defocus, self.settings.source.defocus_plane
        if plane >= (1 if planes is None else len(planes)):
            count = "is no focal series" if planes is None else f"has {len(planes)} planes, counted from 0"
            raise SourceError(f"source.defocus_plane is {plane}, but {self.movie.name} {count}")

    def _forget(self, steps: Sequence[str]) -> None:
        """Remove the parts of steps that must be computed again; the ledger forgets them first."""
        self.ledger.add("redo", steps=list(steps))
        self.ledger.flush()
        for step in steps:
            for part in self.parts.glob(f"{step}-*"):
                part.unlink()

    def _note_plan(self) -> None:
        frames, size = self.stack.shape[0], self.settings.blocks.frames or 1
        totals = {step: sum(1 for _ in plan.step_blocks(step, frames, size)) for step in TASKS}
        self.ledger.add("plan", blocks=totals, fingerprints=self.keys)
        for step in TASKS:
            last = self.ledger.last_deps(step)
            if last is None or last[0] != self.keys[step]:
                self.ledger.add("deps", step=step, fingerprint=self.keys[step], deps=self.deps[step])

    # ------------------------------------------------------------------------------------------------- the steps

    def survey(self) -> None:
        """A cheap pass over every block: noise, flags, pairwise shifts."""
        self.step("calibrate")
        self.step("survey")

    def prepare(self) -> None:
        """A handful of global answers, one task each."""
        self.step("drift")
        if self.lead is not None:
            self.groups.wait_for(self.lead, self.engine.stop)
            if read_meta(Path(self.lead.part)) is None:
                self._go_alone()
        self.step("adapt")
        self.groups.adapted(self.movie.name)
        self.step("vote")

    def _go_alone(self) -> None:
        """Forget the lead, which failed: no answer of this movie may claim to be its network."""
        self.lead, self.deps = None, self._depends()
        self.keys = plan.fingerprints(self.deps)
        self.task = dataclasses.replace(self.task, keys=tuple(self.keys.items()), lead=None)
        self._note_plan()
        store.update_run(self.path, self.attributes("running"))

    def process(self) -> None:
        """Every pixel once."""
        self._create_images()
        self.step("process")

    def collect(self) -> Outcome:
        """Part files to tables: the driver creates the arrays, tasks write whole shards."""
        frames, size = self.stack.shape[0], self.settings.blocks.frames or 1
        cuts = list(plan.blocks(frames, size))
        rows = {table: [self._rows(table, start, stop) for start, stop in cuts] for table in collect.TABLES}
        pieces = {table: collect.prefix_sum(cuts, counts) for table, counts in rows.items()}
        if not self.ledger.is_done("collect", 0, frames, self.keys["collect"]) or not self._is_complete():
            self._write_tables(pieces)
        dropped = frames - int((read_meta(self._global_part("drift")) or {}).get("good", frames))
        if not self.movie.settings.stacks.keep and self.movie.files.reader != "stack":
            store.remove(self.stack.path)
        columns, particles = (sum(rows[table]) for table in ("columns", "particles"))
        return Outcome(self.movie.name, "complete", self.path, frames, columns, dropped, particles=particles)

    def _write_tables(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        # From here until the end the tables are not those of any fingerprint: no older record may vouch for them.
        frames = self.stack.shape[0]
        self._done("collect", 0, frames, {"status": "running"})
        self.ledger.flush()
        classes = models.classes_of(self.settings)
        known: dict[str, Any] = {"time": self.stack.time, "species_class": list(classes)}
        sizes = {"species_class": len(classes)}
        if self.stack.defocus is not None:
            known["defocus"], sizes["defocus"] = self.stack.defocus, self.stack.planes
        for table, schema in collect.TABLES.items():
            of_frames = table == "frames"
            rows = pieces[table][-1].first_row + pieces[table][-1].rows
            store.create_table(
                self.path, schema, rows, sizes=sizes if of_frames else {}, coordinates=known if of_frames else {}
            )
        shards = [shard for table in collect.TABLES for shard in collect.shards(self.task, table, pieces[table])]
        name, seconds = self.movie.name, 0.0
        self.engine.progress.begin(name, "collect", len(shards) + 1)
        for _, result in self._stream(collect.write_shard, shards, "collect"):
            seconds += sum(result["seconds"].values())
            self.engine.progress.advance(name, "collect", 1)
        graph.call(
            self.engine.client, collect.write_examples, self.task, label="examples", stop=self.engine.stop,
            resources=self.engine.resources(),
        )  # fmt: skip
        self.engine.progress.advance(name, "collect", 1)
        store.update_run(self.path, self.attributes("complete"))
        self._done("collect", 0, frames, {"seconds": {"collect": round(seconds, 4)}})

    def _is_complete(self) -> bool:
        return store.kind_of(self.path) == "run" and self._tables_exist()

    def _tables_exist(self) -> bool:
        tree = store.open_tree(self.path)
        complete = set(collect.TABLES) <= set(tree.children)
        tree.close()
        if complete:
            store.update_run(self.path, self.attributes("complete"))
        return complete

    # ------------------------------------------------------------------------------------------------ one step

    def step(self, name: str) -> None:
        """Compute the blocks of a step that are not finished, and put every result into the ledger."""
        frames, size = self.stack.shape[0], self.settings.blocks.frames or 1
        cuts = list(plan.step_blocks(name, frames, size))
        todo = [cut for cut in cuts if not self._is_finished(name, *cut)]
        self.engine.progress.begin(self.movie.name, name, frames)
        self.engine.progress.advance(self.movie.name, name, frames - sum(stop - start for start, stop in todo))
        current: Task | None = None
        try:
            for current, result in self._stream(TASKS[name], self._sent(name, todo), name):
                self.engine.pulse.finished(self.movie.name, name)
                self._done(name, current.start, current.stop, result)
                self.engine.progress.advance(self.movie.name, name, current.stop - current.start)
        except Stopped:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.ledger.add("failure", step=name, fingerprint=self.keys[name], reason=reason[:2000])
            raise
        finally:
            self.engine.pulse.dropped(self.movie.name, name)

    def _sent(self, name: str, cuts: Sequence[tuple[int, int]]) -> Iterator[Task]:
        """The tasks of blocks, each counted as it is taken."""
        for start, stop in cuts:
            self.engine.pulse.sent(self.movie.name, name)
            yield dataclasses.replace(self.task, start=start, stop=stop)

    def _stream(self, function: Callable[[Any], Any], items: Any, label: str) -> Iterator[tuple[Any, Any]]:
        return graph.stream(
            self.engine.client, function, items, label=f"{label}-{self.movie.name}", stop=self.engine.stop,
            resources=self.engine.resources(label), smaller=blocks.smaller if label == "process" else lambda _: None,
        )  # fmt: skip

    def _is_finished(self, name: str, start: int, stop: int) -> bool:
        """Whether a block is finished; one whose record was lost with its driver is taken up into the ledger."""
        if not plan.finished(self.ledger, self.parts, name, start, stop, self.keys[name]):
            return False
        if not self.ledger.is_done(name, start, stop, self.keys[name]):
            found = blocks.adopted(dataclasses.replace(self.task, start=start, stop=stop), name)
            if found is None:
                return False
            self._done(name, start, stop, found)
        return True

    def _done(self, step: str, start: int, stop: int, result: Mapping[str, Any]) -> None:
        facts = {"step": step, "start": start, "stop": stop, "fingerprint": self.keys[step], "status": "done"}
        self.ledger.add("block", **{**facts, **result})

    def _rows(self, table: str, start: int, stop: int) -> int:
        return stop - start if table == "frames" else self.ledger.rows("process", start, stop, table)

    def _global_part(self, step: str) -> Path:
        return part_path(self.parts, step, 0, self.stack.shape[0], self.keys[step])

    def _create_images(self) -> None:
        """Create the arrays of images to keep, unless those of this very computation are there already."""
        wanted = self.movie.settings.images.save
        key = plan.digest([self.keys["process"], self.stack.time.tolist()])
        marker = part_path(self.parts, "images", 0, self.settings.blocks.frames or 1, key)
        if bool(wanted) == (self.path / "images").exists() and (marker.exists() or not wanted):
            return
        # There is one set of images, so markers of other settings vouch for nothing any more.
        for old in self.parts.glob("images-*"):
            old.unlink()
        images.remove_images(self.path)
        if not wanted:
            return
        self._forget(("process",))
        for name in wanted:
            images.create_image(
                self.path, name, time=self.stack.time, shape=self.stack.shape, sampling=self.stack.sampling,
                origin=self.stack.origin, block_frames=self.settings.blocks.frames or 1,
            )  # fmt: skip
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()

    def attributes(self, state: str) -> dict[str, Any]:
        """What the run says of itself."""
        facts = describe_run(
            self.task, self.stack, movie=self.movie.name, output=self.engine.output, weights=self.weights
        )  # fmt: skip
        return {"state": state, **facts}
