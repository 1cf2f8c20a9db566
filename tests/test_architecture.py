"""Which module may import which: read from the syntax tree, so that a lazy import counts too."""

import ast
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("pipelines", "models", "data")
STAGES = ("prepare_corpus", "train_vae", "encode_latents", "train_unet", "evaluate")
TOOLS = ("sample", "compare", "sync", "plan", "doctor", "benchmark", "benchmark_data", "export", "reconstruct")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))

# Third-party package -> the only files that may import it.
DOORS = {
    "mlflow": ("pipelines/runtime/tracking/mlflow_store.py", "pipelines/tools/compare.py"),
    "xformers": ("models/attention.py",),
    "webdataset": ("data/", "pipelines/tools/benchmark_data.py"),
    "accelerate": ("pipelines/",),
    "diffusers": ("pipelines/tools/benchmark.py",),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with ``from a import b`` as both ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(imports: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imports)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_dependency_comes_through_its_door(path: Path) -> None:
    imports, place = imports_of(path), path.relative_to(REPOSITORY).as_posix()
    for package, doors in DOORS.items():
        if reaches(imports, package):
            assert place.startswith(doors), f"{place} imports {package}; only {', '.join(doors)} may"


def test_models_and_data_know_nothing_of_the_rest() -> None:
    for path in SOURCES:
        own = path.relative_to(REPOSITORY).parts[0]
        if own in ("models", "data"):
            for package in PACKAGES:
                assert package == own or not reaches(imports_of(path), package), f"{path} imports {package}"


def test_diffusion_is_pure_mathematics() -> None:
    import sys

    allowed = {*sys.stdlib_module_names, "torch", "pydantic"}
    for path in (REPOSITORY / "models" / "diffusion").glob("*.py"):
        for module in imports_of(path):
            assert module.split(".")[0] in allowed or module.startswith("models.diffusion"), f"{path} imports {module}"


def test_networks_and_diffusion_meet_in_the_denoiser_alone() -> None:
    for path in (REPOSITORY / "models").glob("*.py"):
        if path.name not in ("denoiser.py", "diffusers_format.py", "diffusers_config.py"):
            assert not reaches(imports_of(path), "models.diffusion"), path


def test_no_stage_imports_a_stage() -> None:
    for path in SOURCES:
        for stage in STAGES:
            if path.stem != stage and path.stem not in TOOLS:
                assert not reaches(imports_of(path), f"pipelines.{stage}"), f"{path} imports the stage {stage}"


def test_the_runtime_knows_nothing_of_images() -> None:
    allowed = (
        "data.files",
        "data.manifest",
        "data.randomness",
        "pipelines.runtime.config",
        "pipelines.runtime",
    )
    for path in (REPOSITORY / "pipelines" / "runtime").glob("*.py"):
        for module in imports_of(path):
            if module.split(".")[0] in PACKAGES and module not in PACKAGES:
                assert module.startswith(allowed), f"{path} imports {module}"


def test_nothing_is_pickled_or_run_through_a_shell() -> None:
    for path in SOURCES:
        imports = imports_of(path)
        assert not reaches(imports, "pickle") or path.name == "perceptual_weights.py", f"{path} imports pickle"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
