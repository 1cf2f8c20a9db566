"""The plan of the house: which module may import which, what a folder holds, and words that a module may not open with.

Read from the syntax tree, recursively, so that a lazy import counts too.
"""

import ast
import functools
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from conftest import REPOSITORY, STAGES

PACKAGES = ("pipelines", "models", "data")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").glob("*.py"))

# Storeys from the ground up: a module imports, and starts, modules of its own storey and of those below it.
STOREYS = (
    ("data", "models"),
    ("pipelines.runtime.config",),
    ("pipelines.runtime.tracking",),
    ("pipelines.runtime.stage",),
    ("pipelines.runtime.training",),
    ("pipelines.model",),
    ("pipelines.evaluation",),
    tuple(f"pipelines.{stage}" for stage in STAGES),
    ("pipelines.tools",),
)

LONG_FUNCTION = 12  # lines of code, from which on a function's paragraphs are headed by comments

# Third-party package -> the only files that may import it.
DOORS = {
    "mlflow": ("pipelines/runtime/tracking/mlflow_store.py", "pipelines/tools/compare.py"),
    "xformers": ("models/attention.py",),
    "webdataset": ("data/", "pipelines/tools/benchmarks/"),
    "accelerate": ("pipelines/",),
    "diffusers": ("pipelines/tools/benchmarks/peers.py",),
    "transformers": ("models/conditioning/",),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> Sequence[ast.AST]:
    return tuple(ast.walk(tree_of(path)))


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with ``from a import b`` as both ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def started_by(path: Path) -> set[str]:
    """Every module that a file names right behind "-m" in a list, tuple or call; a placeholder ends the name."""
    found: set[str] = set()
    for node in nodes_of(path):
        items = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        for flag, module in itertools.pairwise(items):
            if isinstance(flag, ast.Constant) and flag.value == "-m":
                parts = module.values if isinstance(module, ast.JoinedStr) else [module]
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                found |= {str(texts[0]).rstrip(".")} if texts else set()
    return found


def reaches(imports: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imports)


@functools.cache
def storey_of(module: str) -> int | None:
    """The number of a module's storey; None for what stands above or outside all of them, as ``pipelines`` itself."""
    within = [n for n, rooms in enumerate(STOREYS) if any(reaches({module}, room) for room in rooms)]
    return within[-1] if within else None


def test_every_dependency_comes_through_its_door() -> None:
    for path in SOURCES:
        imports, place = imports_of(path), path.relative_to(REPOSITORY).as_posix()
        for package, doors in DOORS.items():
            if reaches(imports, package):
                assert place.startswith(doors), f"{place} imports {package}; only {', '.join(doors)} may"


def test_no_import_and_no_started_module_climbs_a_storey() -> None:
    for path in SOURCES:
        own = storey_of(name_of(path))
        for module in imports_of(path) | started_by(path):
            theirs = storey_of(module)
            if own is not None and theirs is not None:
                assert theirs <= own, f"{name_of(path)} reaches up to {module}"
            if own == 0 and theirs == 0:
                assert module.split(".")[0] == name_of(path).split(".")[0], f"{name_of(path)} imports {module}"


def test_no_stage_imports_a_stage() -> None:
    for path in SOURCES:
        others = {f"pipelines.{stage}" for stage in STAGES} - {name_of(path)}
        if storey_of(name_of(path)) != len(STOREYS) - 1:  # tools may
            assert not imports_of(path) & others, f"{path} imports a stage"


def test_every_module_has_a_storey() -> None:
    assert [name_of(path) for path in SOURCES if storey_of(name_of(path)) is None] == ["pipelines", "pipelines.runtime"]


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {name_of(path) for path in SOURCES}
    arrows = {name_of(path): imports_of(path) & modules - {name_of(path)} for path in SOURCES}
    while free := {module for module, reached in arrows.items() if not reached & arrows.keys()}:
        arrows = {module: reached for module, reached in arrows.items() if module not in free}
    assert not arrows, f"in circles: {sorted(arrows)}"


def test_pipelines_holds_the_stages_and_no_folder_more_than_twelve_modules() -> None:
    assert {path.stem for path in (REPOSITORY / "pipelines").glob("*.py")} == {"__init__", *STAGES}
    for folder in {path.parent for path in SOURCES}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        most = 16 if folder.name == "tools" else 12
        assert len(modules) <= most, f"{folder} holds {len(modules)} modules"


def test_diffusion_is_pure_mathematics() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "pydantic"}
    for path in (REPOSITORY / "models" / "diffusion").glob("*.py"):
        for module in imports_of(path):
            assert module.split(".")[0] in allowed or module.startswith("models.diffusion"), f"{path} imports {module}"


def test_networks_and_diffusion_meet_in_the_denoiser_alone() -> None:
    for path in (REPOSITORY / "models").glob("*.py"):
        if path.name not in ("denoiser.py", "latent_diffusion.py"):
            assert not reaches(imports_of(path), "models.diffusion"), path


def test_the_runtime_knows_nothing_of_images() -> None:
    allowed = ("data.files", "data.manifest", "data.prefetch", "data.randomness", "pipelines.runtime")
    for path in (REPOSITORY / "pipelines" / "runtime").rglob("*.py"):
        for module in imports_of(path):
            if module.split(".")[0] in PACKAGES and module not in PACKAGES:
                assert module.startswith(allowed), f"{path} imports {module}"


def test_nothing_is_pickled_or_run_through_a_shell() -> None:
    for path in SOURCES:
        imports = imports_of(path)
        assert not reaches(imports, "pickle") or path.name == "perceptual_weights.py", f"{path} imports pickle"
        for node in nodes_of(path):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, f"{path} starts a shell"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "np.load",
                "eval",
                "exec",
                "os.system",
            ):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, f"{path} calls {ast.unparse(node.func)}"


def test_every_stage_tells_its_command_and_every_package_is_found() -> None:
    for stage in STAGES:
        assert f"-m pipelines.{stage} --config" in (REPOSITORY / "pipelines" / f"{stage}.py").read_text(), stage
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package: an installed wheel would lack it"
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["tool"]["setuptools"]["package-dir"] == {"": "."}


def test_the_top_of_the_tree_holds_nothing_else() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    expected = {"pyproject.toml", "README.md", "LICENSE", "pipelines", "models", "data", "launch", "tests", "docker"}
    assert {name for name in top if not name.startswith(".")} <= expected
    assert not (REPOSITORY / "docker" / "__init__.py").exists()


def test_the_table_of_equivalences_names_tests_that_are_there() -> None:
    documentation = ast.get_docstring(ast.parse((REPOSITORY / "models" / "__init__.py").read_text(encoding="utf-8")))
    assert documentation is not None
    rows = [line.split("  ") for line in documentation.splitlines() if line.startswith("    ")][1:]
    named = [row[-1].strip() for row in rows]
    assert len(named) > 20
    for name in named:
        assert (REPOSITORY / "tests" / f"test_{name}.py").is_file(), name


def test_manifests_are_read_by_attribute() -> None:
    for path in SOURCES:
        if name_of(path) != "data.manifest":
            assert not re.search(r"\bcontent(\[|\.get\()", path.read_text(encoding="utf-8")), path


def test_every_module_says_first_what_it_holds() -> None:
    for path in SOURCES:
        documentation = ast.get_docstring(tree_of(path)) or ""
        assert documentation, f"{path} has no docstring"
        first = documentation.split()[0]
        assert first not in ("What", "Who", "How", "Which", "Whether", "Where", "When"), f"{path}: {first} ..."


def definitions_of(tree: ast.Module) -> Iterator[str]:
    """Yield the public functions, classes and methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (method.name for method in node.body if isinstance(method, ast.FunctionDef))


def names_in(path: Path) -> Iterator[str]:
    """Yield every name and attribute that is used in a file, imports apart."""
    for node in nodes_of(path):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value  # by getattr, or as an annotation in quotes


def test_no_public_definition_is_there_for_tests_alone() -> None:
    used = {name for path in SOURCES for name in names_in(path)}
    named_by_tests = {name for path in TESTS for name in names_in(path)}
    for path in SOURCES:
        if not name_of(path).startswith("models.diffusion."):
            idle = {name for name in definitions_of(tree_of(path)) if not name.startswith("_")} - used
            assert not idle & named_by_tests, f"{path}: only tests name {sorted(idle & named_by_tests)}"


def test_long_functions_of_the_stages_and_of_training_have_paragraph_comments() -> None:
    rooms = [REPOSITORY / "pipelines" / f"{stage}.py" for stage in STAGES]
    rooms += (REPOSITORY / "pipelines" / "runtime" / "training").glob("*.py")
    bare = []
    for path in rooms:
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = {number for number, line in enumerate(lines, start=1) if line.strip().startswith("#")}
        code = {number for number, line in enumerate(lines, start=1) if line.strip()} - comments
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                inside = range(body[0].lineno if body else 0, (node.end_lineno or 0) + 1)
                commented = comments.intersection(range(node.lineno, inside.stop))
                if len(code.intersection(inside)) > LONG_FUNCTION and not commented:
                    bare.append(f"{path.name}:{node.lineno} {node.name}")
    assert not bare


def named(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_only_the_model_object_normalises_latents() -> None:
    for path in SOURCES:
        images = path.parent.name in ("features", "metrics") or path.name == "perceptual.py"
        if name_of(path) == "models.latent_diffusion" or images:
            continue
        for node in nodes_of(path):
            if isinstance(node, ast.BinOp) and isinstance(node.left, ast.BinOp):
                names = {named(node.right), named(node.left.right), named(node.left.left)}
                kinds = (type(node.left.op), type(node.op))
                scales = kinds in ((ast.Sub, ast.Div), (ast.Mult, ast.Add)) and {"mean", "std"} <= names
                assert not scales, f"{path}:{node.lineno} normalises or restores: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and named(node.func) in ("normalise", "restore"):
                raise AssertionError(f"{path}:{node.lineno} normalises or restores: {ast.unparse(node)}")
