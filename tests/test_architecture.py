"""The house keeps its walls: who may import whom, what no file may call, and how large things may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("schemas", "pipeline", "cluster")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8

# Exceptions, each with its reason. A test below fails if one of them is not needed any more.
ZARR_IS_OPENED_BY = {
    "pipeline/store.py": "the only file that opens stores of ours",
    "pipeline/ingest/formats_zarr.py": "a Zarr *source* is a vendor file like any other; opened for reading only",
}
CLUSTER_IS_IMPORTED_BY = {
    "pipeline/cli.py": "joins pipeline and cluster",
    "pipeline/cli_cluster.py": "the verbs of the command line that are about batch systems",
    "pipeline/demo.py": "the body of the verb `demo`",
    "pipeline/cli_models.py": "the verbs of the command line that make models",
}
DASK_IS_CONFIGURED_BY = {"pipeline/simulate/imaging.py": "abTEM computes through Dask; it is told to do so right here"}
MANY_PARAMETERS = {
    "pipeline/networks/blindspot.py:__init__": "what a file of weights says of its network, each by its name",
    "pipeline/steps/column_fit.py:refine": "frame, denoised frame, two coordinates, five settings that have no default",
    "pipeline/steps/drift.py:pair_shifts": "frames, pairs, flags, weight, four settings that have no default, device",
    "pipeline/steps/segment.py:column_probability": "network, frames, two samplings, sign, window, halo, batch, device",
    "pipeline/store.py:create_stack": "each names one axis or fact of a stack",
}
LONG_FUNCTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Source:
    """A parsed file of ours."""

    name: str
    text: str
    tree: ast.Module

    @property
    def imports(self) -> list[str]:
        """Dotted names of all that is imported anywhere in the file; ``from a import b`` gives ``a.b``."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno} is a relative import; expected an absolute one"
                found += [f"{node.module}.{alias.name}" for alias in node.names]
        return found

    @property
    def ours(self) -> list[str]:
        """The imports that are of our packages."""
        return [name for name in self.imports if name.split(".")[0] in PACKAGES]

    def calls(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every call."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node.lineno, ast.unparse(node.func)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


@cache
def sources() -> tuple[Source, ...]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    texts = {file: file.read_text() for file in files}
    return tuple(Source(str(f.relative_to(ROOT)), text, ast.parse(text)) for f, text in texts.items())


def below(*folders: str) -> list[Source]:
    found = [source for source in sources() if source.name.startswith(folders)]
    assert found, folders
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def report(problems: list[str]) -> None:
    assert not problems, "\n  ".join(["", *problems])


# ------------------------------------------------------------------------------------------------------------ arrows


def test_schemas_import_nothing_of_ours_and_nothing_heavy() -> None:
    heavy = ("dask", "distributed", "torch", "zarr", "xarray")
    report([
        f"{source.name} imports {name}"
        for source in below("schemas/")
        for name in source.imports
        if within(name, "pipeline", "cluster", *heavy)
    ])  # fmt: skip


def test_cluster_knows_nothing_of_the_pipeline() -> None:
    report([f"{s.name} imports {name}" for s in below("cluster/") for name in s.ours if within(name, "pipeline")])


def test_only_the_command_line_joins_pipeline_and_cluster() -> None:
    users = {source.name for source in below("pipeline/") for name in source.ours if within(name, "cluster")}
    assert users == set(CLUSTER_IS_IMPORTED_BY)


PURE = {
    "pipeline/steps/": ("pipeline.steps", "pipeline.networks"),
    "pipeline/networks/": ("pipeline.networks", "pipeline.steps", "pipeline.simulate"),
    "pipeline/simulate/": ("pipeline.simulate",),
}


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_errors_and_each_other_only(room: str) -> None:
    report([
        f"{source.name} imports {name}"
        for source in below(room)
        for name in source.ours
        if not within(name, *PURE[room], "schemas.errors")
    ])  # fmt: skip


def test_steps_see_arrays_only() -> None:
    forbidden = ("dask", "distributed", "xarray", "zarr", "pathlib", "pydantic", "os", "yaml", "h5py", "tifffile")
    report(
        [f"{s.name} imports {name}" for s in below("pipeline/steps/") for name in s.imports if within(name, *forbidden)]
    )


def test_networks_see_no_store_and_no_scheduler() -> None:
    forbidden = ("dask", "distributed", "xarray", "zarr")
    report([
        f"{source.name} imports {name}"
        for source in below("pipeline/networks/", "pipeline/simulate/")
        for name in source.imports
        if within(name, *forbidden) and source.name not in DASK_IS_CONFIGURED_BY
    ])  # fmt: skip


def test_only_the_store_opens_zarr() -> None:
    openers = ("open_zarr", "open_datatree", "to_zarr")
    users = {source.name for source in sources() for name in source.imports if within(name, "zarr")}
    users |= {source.name for source in sources() for _, call in source.calls() if call.endswith(openers)}
    users |= {source.name for source in sources() if 'engine="zarr"' in source.text}
    assert users == set(ZARR_IS_OPENED_BY)


def test_zarr_sources_are_opened_for_reading_only() -> None:
    (reader,) = below("pipeline/ingest/formats_zarr.py")
    opened = [n for n in ast.walk(reader.tree) if isinstance(n, ast.Call) and ast.unparse(n.func).startswith("zarr.")]
    assert opened
    for call in opened:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("mode") == "'r'", ast.unparse(call)


def test_only_graph_builds_tasks() -> None:
    names = ("submit", "map", "as_completed", "delayed", "persist", "compute", "scatter", "gather", "from_array")
    dask_users = {s.name for s in sources() if any(within(name, "dask", "distributed") for name in s.imports)}
    report([
        f"{source.name}:{line} calls {call}"
        for source in sources()
        if source.name != "pipeline/graph.py"
        for line, call in source.calls()
        if (call.split(".")[-1] in names and source.name in dask_users and call not in ("map", "pool.submit"))
        or within(call, "dask.delayed", "dask.compute")
    ])  # fmt: skip
    report([
        f"{s.name} imports {name}"
        for s in sources()
        for name in s.imports
        if within(name, "dask.array", "dask.dataframe", "dask.bag", "dask.delayed")
        or name.split(".")[-1] in ("as_completed", "delayed")
    ])  # fmt: skip


def test_rooms_never_import_what_runs_them() -> None:
    above = ("pipeline.story", "pipeline.cli", "pipeline.preflight", "pipeline.demo", "pipeline.blocks")
    report([
        f"{source.name} imports {name}"
        for source in below("pipeline/ingest/", "pipeline/store.py", "pipeline/ledger.py", "pipeline/graph.py",
                            "pipeline/parts.py", "pipeline/plan.py", "pipeline/results/", *PURE)
        for name in source.ours
        if within(name, *above)
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------- what no file does


def test_nothing_is_validated_by_assert() -> None:
    report([
        f"{source.name}:{node.lineno} asserts"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert)
    ])  # fmt: skip


def test_nothing_loads_code_from_data() -> None:
    modules = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    calls = ("eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "__import__")
    report([f"{s.name} imports {name}" for s in sources() for name in s.imports if within(name, *modules)])
    report([f"{s.name}:{line} calls {call}" for s in sources() for line, call in s.calls() if call in calls])
    report([f"{s.name} allows pickles" for s in sources() if "allow_pickle=True" in s.text.replace(" ", "")])


def test_stores_are_opened_without_consolidated_metadata() -> None:
    openers = ("zarr.open_group", "xr.open_zarr", "xr.open_datatree")
    seen = 0
    for source in below(*ZARR_IS_OPENED_BY):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in openers:
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert "False" in (given.get("use_consolidated"), given.get("consolidated")), ast.unparse(node)
                seen += 1
    assert seen


def test_nothing_is_silenced() -> None:
    """A bare except, or one of everything with nothing in it, hides what went wrong."""
    report([
        f"{source.name}:{node.lineno} swallows everything"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
    ])  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- size


def test_files_fit_on_a_few_screens() -> None:
    long = {s.name: s.text.count("\n") for s in sources() if s.text.count("\n") > MAX_FILE_LINES}
    assert not long


def test_functions_fit_on_a_screen() -> None:
    long = {
        f"{source.name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for source in sources()
        for node in source.functions()
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert set(long) == set(LONG_FUNCTIONS), long


def test_functions_have_few_parameters() -> None:
    many = {}
    for source in sources():
        for node in source.functions():
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                many[f"{source.name}:{node.name}"] = count
    assert set(many) == set(MANY_PARAMETERS), many
    assert all(count <= MAX_PARAMETERS + 1 for count in many.values())


def test_public_things_say_what_they_are() -> None:
    report([
        f"{source.name}:{node.lineno} {node.name} has no docstring"
        for source in sources()
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ])  # fmt: skip


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py is left out of the wheel."""
    folders = {Path(source.name).parent for source in sources()}
    assert {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()
