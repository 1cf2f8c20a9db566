"""Laws of the tools' command lines: one format of help, one dialect of options, one set of exit codes."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMOKE, environment

from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, Stopped
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.config.stage_config import TOOL_TABLES, CommandConfig
from pipelines.tools.benchmark import BenchmarkConfig
from pipelines.tools.command import main as latentline
from pipelines.tools.command import tools_and_purposes

# Tool -> an option with one letter wrong and its right name, and an option with a wrong value.
MISSPELT = {
    "benchmark": ("--ruonds", "rounds", ("data", "--rounds", "many")),
    "compare": ("--rnus", "runs", ("/nowhere",)),
    "doctor": ("--min-gigabyte-per-s", "min_gigabytes_per_s", ("--min-gigabytes-per-s", "-1")),
    "export": ("--guidance-scal", "guidance_scale", ("--format", "onnx")),
    "plan": ("--utilization", "utilisation", ("--devices", "0")),
    "reconstruct": ("--relative-sdt", "relative_std", ("--output", "x", "--relative-std", "wide")),
    "report": ("--ouptut", "output", ("/nowhere",)),
    "sample": ("--nubmer", "number", ("--guidance.scale", "much")),
    "sync": ("--traking-uri", "tracking_uri", ("/nowhere",)),
    "trace": ("--serach", "search", ("/nowhere",)),
}

COMMENT_COLUMN = 72  # of a key's line in the help


class Config(CommandConfig):
    """Words."""

    positional = "words"

    words: tuple[str, ...] = ("none",)  # to say
    loud: bool = False  # in capitals
    part: str = ""  # of them


def loaded(*argv: str) -> Config:
    return load_config(Config, table="sync", argv=argv)


def call(capfd: pytest.CaptureFixture[str], name: str, *words: str) -> tuple[int, str, str]:
    """Call a tool as ``latentline NAME`` does: its exit code, and what it printed."""
    capfd.readouterr()
    try:
        code = importlib.import_module(f"pipelines.tools.{name}").main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capfd.readouterr()


def test_every_tool_is_listed_with_its_purpose_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines.tools.command"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")} == set(TOOL_TABLES)
    assert all(len(purpose) > 20 for purpose in tools_and_purposes().values())
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert not imported & {"torch", "numpy", "pydantic", "data", "models"}, "it would take seconds"


@pytest.mark.parametrize("name", TOOL_TABLES)
def test_every_tool_speaks_one_dialect(name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = ("benchmark", "compare", "report", "sync", "trace")
    config = [] if name in own else ["--config", str(SMOKE), "--run.root", str(tmp_path)]
    module = importlib.import_module(f"pipelines.tools.{name}")
    code, said, _ = call(capfd, name, *config, "--help")
    assert code == 0
    assert said.startswith(str(module.__doc__).strip())
    assert f"\nkeys of [{name}]" in said
    for line in ("--config EXPERIMENT.toml", "--json", "--print-config"):
        assert f"\n  {line}  " in said
    keys = said.split("with their defaults:\n\n")[1].split("\n\n")[0].splitlines()
    assert not [line for line in keys if len(line) <= COMMENT_COLUMN], "each key has its comment"

    wrong, right, bad = MISSPELT[name]
    words = ("data",) if name == "benchmark" else ("x",) if not config else ()
    code, out, said = call(capfd, name, *config, *words, wrong, "1", "--json")
    assert (code, out) == (2, "")
    assert f"unknown key; did you mean {right}?" in said
    code, out, said = call(capfd, name, *config, *bad, "--json")
    assert (code, out) == (2, ""), "nothing but JSON is ever printed there"
    assert said.startswith(f"{name}: ")
    assert "Traceback" not in said


def test_words_without_a_name_fill_one_key_and_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text('[run]\nroot = "x"\n[sync]\nwords = ["c"]\npart = "p"\n')
    assert loaded().words == ("none",)
    assert loaded("a", "--loud", "b").words == ("a", "b")
    assert loaded("--loud", "a") == loaded("a", "--loud=true") == loaded("--loud", "true", "a")
    assert loaded("--words", "a", "b").words == loaded('--words=["a", "b"]').words == ("a", "b")
    assert loaded("--config", str(file)) == Config(words=("c",), part="p")
    assert loaded("--config", str(file), "a").words == ("a",)
    with pytest.raises(ConfigError, match=r"run \(command line\)\n      unknown key; known here: words, loud, part"):
        loaded("--run.root", "x")


def test_an_answer_is_text_or_one_json_object_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Config) -> Answer:
        print("on the way")
        if config.part:
            raise {"wrong": ConfigError("part = 'wrong'"), "stop": Stopped(), "break": KeyboardInterrupt()}[config.part]
        return Answer({"said": list(config.words)}, " ".join(config.words), code=1)

    def run(*argv: str) -> tuple[int, str, str]:
        return run_tool(Config, work, table="sync", about="", argv=argv), *capsys.readouterr()

    assert run("a", "b") == (1, "on the way\na b\n", "")
    code, out, err = run("a", "b", "--json")
    assert (code, json.loads(out), err) == (1, {"said": ["a", "b"]}, "on the way\n")
    assert run("--part", "wrong")[::2] == (2, "sync: part = 'wrong'\n")
    assert run("--part", "stop")[0] == run("--part", "break")[0] == 75


def test_an_unknown_tool_gets_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, hint in (("smaple", "; did you mean sample? Tools are "), ("qqq", ". Tools are benchmark, ")):
        monkeypatch.setattr(sys, "argv", ["latentline", word])
        assert latentline() == 2
        assert f"latentline: no tool '{word}'{hint}" in capsys.readouterr().err


def test_the_command_passes_words_and_exit_codes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["latentline", "sync", str(tmp_path), "--json"])
    assert latentline() == 2
    assert f"No run lies in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pipelines.tools.command", "plan"], ["pipelines.train_vae"]])
def test_ctrl_c_while_a_command_is_imported_ends_it_as_later(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    here = {"cwd": REPOSITORY, "env": environment(PYTHONPATH=f"{tmp_path}:{REPOSITORY}"), "capture_output": True}
    done = subprocess.run([sys.executable, "-m", *words], text=True, **here)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "latentline: stopped.\n")


def test_the_benchmark_takes_its_figures_file_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("pipelines.tools.benchmark.MEASURES", {"data": ()})  # nothing is measured
    code, _, said = call(capfd, "benchmark", "data", "--output", str(tmp_path / "none" / "f.json"))
    assert (code, said) == (2, f"benchmark: benchmark.output: {tmp_path}/none/f.json: No such file or directory\n")
    config = load_config(BenchmarkConfig, table="benchmark", argv=["data", "--rounds", "3", "--output", "f.json"])
    assert config == BenchmarkConfig(subjects=("data",), rounds=3, output="f.json")


@pytest.mark.parametrize(("shadow", "named"), [("data/__init__.py", "data"), ("models.py", "models.py")])
def test_a_command_names_the_folder_that_shadows_its_packages(shadow: str, named: str, tmp_path: Path) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).touch()
    for module in ("pipelines.train_unet", "pipelines.tools.sync"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{tmp_path / named} shadows the package {REPOSITORY / Path(named).stem}" in done.stderr
        assert "PYTHONSAFEPATH=1" in done.stderr
        assert "Traceback" not in done.stderr


def test_help_of_the_plan_loads_no_tracking_attention_or_diffusers() -> None:
    code = (
        "import sys; from pipelines.tools import plan\n"
        "try: plan.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('LOADED', sorted({'mlflow', 'xformers', 'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout + done.stderr
