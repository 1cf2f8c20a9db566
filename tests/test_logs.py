"""Laws of the log lines: each with its time, level, command and rank, printed once, above the progress bar."""

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, STAGES, TIMEOUT_SECONDS, Run, environment, stage_command, start_warm

from pipelines.runtime.config.command_line import Answer, config_from_command_line, run_tool
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.logs import say_mistake, set_up_logging
from pipelines.runtime.config.stage_config import CommandConfig, StageConfig
from pipelines.runtime.stage.progress import progress_line
from pipelines.tools import command

log = logging.getLogger("latentline.stage")


def test_every_line_of_a_message_has_time_level_command_and_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = {}
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        set_up_logging("train_unet")
        log.info("changed:\n  seed was 0")
        log.warning("a straggler")
        said[rank] = capsys.readouterr()
    head = r"\d\d:\d\d:\d\d {} train_unet\[{}/4\] {}\n"
    assert re.fullmatch(head.format("INFO", 0, "changed:") + head.format("INFO", 0, "  seed was 0"), said["0"].out), (
        said["0"].out
    )
    assert re.fullmatch(head.format("WARNING", 0, "a straggler"), said["0"].err)
    assert said["3"].out == ""
    assert re.fullmatch(head.format("WARNING", 3, "a straggler"), said["3"].err)


def test_a_line_is_printed_once_whatever_other_libraries_did_to_logging(capsys: pytest.CaptureFixture[str]) -> None:
    levels = [logging.getLogger(name).level for name in ("mlflow", "accelerate", "torch")]
    other = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(other)
    try:
        set_up_logging("sync")
        set_up_logging("sync")
        log.warning("once")
    finally:
        logging.getLogger().removeHandler(other)
    said = capsys.readouterr()
    assert (said.out + said.err).count("once") == 1
    assert [logging.getLogger(name).level for name in ("mlflow", "accelerate", "torch")] == levels


def test_log_lines_go_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    set_up_logging("train_unet")
    with progress_line("train_unet", total=9, unit="updates") as line:
        line.advance_to(4)
        log.info("update 4: PSNR 20 dB")
        line.advance_to(9)
    text = re.sub(r"\x1b\[[\d;]*m|\r", "", terminal.getvalue())
    assert text.count("update 4: PSNR 20 dB") == 1
    # The bar's line is wiped before the log line, and drawn again on the line below it.
    assert re.search(r"\x1b\[2K\d\d:\d\d:\d\d INFO train_unet\[0/1\] update 4: PSNR 20 dB *\n[^\n]*9/9 updates", text)


def test_a_reader_that_goes_costs_lines_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        set_up_logging("train_unet")
        os.close(reader)
        with progress_line("train_unet", total=9, unit="updates") as line:
            log.info("nobody reads this")
            line.advance_to(9)
        log.warning("the end")
    said = capfd.readouterr().err  # closing flushes what is left
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING train_unet\[0/1\] the end\n", said), said


def test_a_command_into_head_ends_in_silence_with_code_0() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "pipelines.tools.command"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_log_on_a_full_disk_costs_lines_and_an_answer_there_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        set_up_logging("train_unet")
        log.info("nowhere to put this")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["latentline"])
    for name, ask in {
        "latentline": command.main,
        "evaluate": lambda: config_from_command_line(StageConfig, table="evaluate", about="", argv=["--help"]),
        "sync": lambda: run_tool(CommandConfig, lambda _: Answer({}, "found"), table="sync", about="", argv=[]),
    }.items():
        with open("/dev/full", "w") as full, pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "stdout", full)
            ask()
        assert end.value.code == 2
        assert capfd.readouterr().err == f"{name}: standard output: No space left on device\n"


def test_closed_streams_take_everything_and_no_file_gets_their_numbers(tmp_path: Path) -> None:
    code = (
        "from pipelines.runtime.config.logs import *; from pipelines.runtime.stage.progress import progress_line\n"
        "set_up_logging('train_unet')\n"
        "with open(sys.argv[1], 'w') as file, progress_line('train_unet', total=9, unit='updates') as line:\n"
        "    line.advance_to(9); file.write(str(file.fileno())); logging.getLogger('latentline.stage').warning('x')\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "file")]
    closed = "exec <&- >&- 2>&- ; exec " + shlex.join(words)
    done = subprocess.run(["bash", "-c", closed], cwd=REPOSITORY, env=environment(), check=False)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_a_mistake_is_said_once_a_machine_and_under_a_launcher_as_a_log_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = ConfigError("2 mistakes:\n  a\n  b")
    say_mistake("train_unet", mistake)
    assert capsys.readouterr().err == "train_unet: 2 mistakes:\n  a\n  b\n"
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = []
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        say_mistake("train_unet", mistake)
        said.append(capsys.readouterr().err.splitlines())
    assert [len(lines) for lines in said] == [3, 0, 3, 0]
    # A launcher ends the others when the first has said it; the mistake of one that it leaves alone is its own.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("pipelines.runtime.config.logs.FIRST_RANK_SECONDS", 0.2)
    began = time.monotonic()
    say_mistake("train_unet", mistake)
    assert time.monotonic() - began >= 0.2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d ERROR train_unet\[[02]/4\] .+", line) for line in said[0] + said[2])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("train_unet", ("--optim.peak_lrr", "1"), "unknown key; did you mean peak_lr?"),
        ("train_vae", ("--inputs.corpus", "/nowhere"), "there is no such folder. The input 'corpus'"),
        ("train_unet", ("--global_batch", "64"), "train_unet.global_batch = 64 cannot be split"),
    ],
)
def test_the_mistake_of_three_ranks_is_said_whoever_leaves_first(
    stage: str, words: tuple[str, ...], message: str, two_process_run: Run, tmp_path: Path
) -> None:
    given = [f"--inputs.{name}={two_process_run.root / name}" for name in ("latents", "vae") if stage == "train_unet"]
    for number in range(20):
        root = tmp_path / str(number)
        launched = start_warm(*stage_command(stage, "--run.root", str(root), *given, *words, processes=3)[1:])
        _, said = launched.communicate(timeout=TIMEOUT_SECONDS)
        assert launched.returncode == 1
        assert message in said
        assert json.loads((root / STAGES[stage] / "outcome.json").read_bytes())["exit_code"] == 2
