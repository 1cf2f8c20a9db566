"""Whoever reads a launch file accepts it: bash, accelerate, Docker and pip; and the files fit each other."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.runtime.config.stage_config import STAGE_FOLDERS

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path
    for pattern in ("launch/*.sh", "launch/slurm/*", "docker/*.sh", "tests/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)
ACCELERATE_FILES = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
YAML_FILES = sorted([*(ROOT / "launch").rglob("*.yaml"), *(ROOT / "docker").glob("*.yaml")])

# Of the Compose specification, what is used here.
COMPOSE_SERVICE_FIELDS = {
    *("image", "build", "command", "environment", "volumes", "ports", "networks", "depends_on", "healthcheck"),
    *("restart", "init", "stop_grace_period", "shm_size", "profiles", "cap_drop", "security_opt", "deploy"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


# Shell


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_bash_can_parse_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing_in_any_script() -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing; it comes with the extra: bash launch/setup.sh test"
    command = [shellcheck, "--external-sources", f"--source-path={ROOT}", *map(str, SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_script_stops_at_the_first_failing_command() -> None:
    sourced = {ROOT / "launch" / "stages.sh"}
    assert [name_of(s) for s in SCRIPTS if s not in sourced and "\nset -euo pipefail\n" not in s.read_text()] == []


def test_the_scripts_know_the_same_stages_as_the_pipeline() -> None:
    shell = (ROOT / "launch" / "stages.sh").read_text()
    found = re.search(r"^ *stages=\((.*)\)$", shell, flags=re.MULTILINE)
    assert found
    assert found.group(1).split() == list(STAGE_FOLDERS)
    assert dict(re.findall(r"\[(\w+)\]=(\w+)", shell)) == STAGE_FOLDERS


def test_ci_runs_what_a_developer_runs() -> None:
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('../tests/run.sh"')


# accelerate


def accepted_by_accelerate(*flags: str) -> Any:
    arguments = launch_command_parser().parse_args([*flags, "-m", "pipelines.train_unet"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=name_of)
def test_accelerate_starts_a_distributed_launcher_that_passes_signals_on(path: Path) -> None:
    arguments = accepted_by_accelerate("--config_file", str(path))
    # Not the simple launcher: it starts one process whatever is asked for, and dies alone of a SIGTERM.
    assert arguments.multi_gpu
    assert not arguments.cpu
    assert arguments.num_processes == documents(path)[0]["num_processes"]


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=name_of)
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_number_of_processes_on_the_command_line_wins(path: Path, num_processes: int) -> None:
    arguments = accepted_by_accelerate("--config_file", str(path), "--num_processes", str(num_processes))
    assert arguments.multi_gpu
    assert arguments.num_processes == num_processes


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=name_of)
def test_precision_and_compilation_are_left_to_the_experiment(path: Path) -> None:
    arguments = accepted_by_accelerate("--config_file", str(path))
    assert (arguments.mixed_precision, arguments.dynamo_backend) == ("no", "no")


def test_two_runs_on_one_machine_do_not_ask_for_the_same_port() -> None:
    for path in ACCELERATE_FILES:
        port = documents(path)[0]["main_process_port"]
        assert (port == 0) == (path.stem != "multi_node"), name_of(path)


# YAML


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_yaml_has_no_key_twice(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        """A repeated key is silently the last one for YAML, and a lost setting for us."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert sorted(set(keys)) == sorted(keys), f"{path}: a key twice in {keys}"
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    list(yaml.load_all(path.read_text(), Loader=Strict))


# Docker


def dockerfile_instructions() -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def dockerfile_targets() -> dict[str, list[tuple[str, str]]]:
    targets: dict[str, list[tuple[str, str]]] = {}
    for word, rest in dockerfile_instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            targets[name] = [*targets.get(base, []), (word, base)]
        elif targets:
            targets[name].append((word, rest))
    return targets


def test_every_image_stands_on_the_base_image_of_the_build_argument() -> None:
    targets = dockerfile_targets()
    assert {"cpu", "cuda", "mlflow"} <= set(targets)
    assert {rest for rows in targets.values() for word, rest in rows if word == "FROM"} == {"${BASE_IMAGE}", "base"}


@pytest.mark.parametrize("target", ["cpu", "cuda", "mlflow"])
def test_no_image_runs_as_root_or_without_a_health_check(target: str) -> None:
    rows = dockerfile_targets()[target]
    assert [rest for word, rest in rows if word == "USER"] == ["1000:1000"]
    assert [word for word, _ in rows].count("HEALTHCHECK") == 1
    words = [word for word, _ in rows]
    assert words.index("USER") < words.index("CMD")


def test_the_image_gets_every_file_it_copies_and_no_results_or_secrets() -> None:
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert not {path.split("/")[0] for path in allowed} & {".git", ".venv", "runs", "tests"}
    for word, rest in dockerfile_instructions():
        for source in rest.split()[:-1] if word == "COPY" else []:
            assert (ROOT / source).exists(), source
            assert source == "." or {source, source.split("/")[0]} & allowed, source


def test_compose_publishes_nothing_beyond_this_machine() -> None:
    compose = documents(ROOT / "docker" / "compose.yaml")[0]
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)
    assert not any(service.get("network_mode") == "host" for service in compose["services"].values())


def test_compose_takes_every_secret_from_the_environment_and_refuses_to_start_without() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    example = dict(
        line.split("=", 1)
        for line in (ROOT / "docker" / "env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    secrets = {name for name in example if re.search("PASSWORD|KEY", name)}
    assert {example[name] for name in secrets} == {""}
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    for name in secrets:
        assert set(re.findall(rf"\$\{{{name}([^}}]*)\}}", text)) == {":?set it in docker/.env"}
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_has_no_key_that_its_specification_does_not_know() -> None:
    compose = documents(ROOT / "docker" / "compose.yaml")[0]
    assert {key for key in compose if not key.startswith("x-")} <= {"name", "services", "networks", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= COMPOSE_SERVICE_FIELDS, name
        assert "image" in service, name
        assert set(service.get("build", {})) <= {"context", "dockerfile", "target", "args"}, name
        assert set(service.get("healthcheck", {})) <= {
            "test",
            "interval",
            "timeout",
            "retries",
            "start_period",
            "disable",
        }


def test_compose_services_use_what_is_declared_and_wait_for_health() -> None:
    compose = documents(ROOT / "docker" / "compose.yaml")[0]
    targets = dockerfile_targets()
    for name, service in compose["services"].items():
        assert set(service["networks"]) <= set(compose["networks"]), name
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], name
        built = "build" in service and service["build"]["target"] in targets  # These images check their own health.
        assert built or "test" in service["healthcheck"], name
        for other, wait in service.get("depends_on", {}).items():
            assert other in compose["services"]
            assert wait["condition"] in {"service_healthy", "service_completed_successfully"}


# pip


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    parsed = [Requirement(line) for line in [*project["dependencies"], *extras]]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(pin.name) for pin in parsed}) == len(parsed)
    return {canonicalize_name(pin.name): pin for pin in parsed}


def test_every_dependency_is_pinned_once_inside_the_range_that_is_declared() -> None:
    pinned = pins()
    for name, requirement in requirements().items():
        assert name in pinned, f"{name} is missing in launch/constraints.txt"
        (exact,) = pinned[name].specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version), f"{pinned[name]} is outside {requirement}"


def test_one_pin_of_torch_serves_machines_with_and_without_gpus() -> None:
    specifier = pins()["torch"].specifier
    (exact,) = specifier
    assert "+" not in exact.version
    assert specifier.contains(f"{exact.version}+cpu")
    assert specifier.contains(f"{exact.version}+cu130")
