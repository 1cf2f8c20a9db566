"""The launch scripts start what they should, pass on how it ended, and stop when they are told to.

The scripts are the real ones, in a folder whose name holds spaces; the interpreter they find there is a recorder that
answers for accelerate and the stages, so that an ending of any kind takes milliseconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from pipelines.runtime.config.stage_config import STAGE_FOLDERS

ROOT = Path(__file__).parent.parent
STAGES = list(STAGE_FOLDERS)
GUIDED = [*STAGES[:4], "train_unet --name guide", "evaluate"]  # of an experiment that names a guide

# What a stage does is a line of shell in the variable STAGE_DOES; $1 is its name, $2 its folder.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *--print-config)
        stage="${2#pipelines.}"
        if [[ " ${MISTAKEN:-} " == *" $stage "* ]]; then echo "$stage: a mistake" >&2; exit 2; fi
        printf '[run]\\nroot = "runs/a b"\\n[%s]\\nseed = 3\\n' "$stage" ;;
    *device_count*) echo "${NUM_GPUS:-0}" ;;
    "-m pipelines.tools.sync "*) echo "${@:3}" >synced ;;
    "-m pipelines.tools.compare "*) echo "${@:3}" >compared ;;
    "-m accelerate.commands.launch "*)
        printf '%s\\n' "${@:3}" >"$RECORDS/$(date +%s%N)"
        name="" before=""
        for word in "$@"; do
            if [[ $word == pipelines.* ]]; then stage="${word#pipelines.}"; fi
            if [[ $before == --name ]]; then name="-$word"; fi
            before="$word"
        done
        declare -A folders=(FOLDERS)
        folder="runs/a b/${folders[$stage]}$name"
        mkdir -p -- "$folder"
        outcome() { printf '{"state": "x", "exit_code": %s}' "$1" >"$folder/outcome.json"; }
        eval "${STAGE_DOES:-outcome 0}" ;;
    *) exec "REAL" "$@" ;;
esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the launch folder with a recording interpreter and a set-up that has nothing to do."""
    root = tmp_path / "a b"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "launch" / "setup.sh").write_text("exit 0\n")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "records").mkdir()
    (root / "x.toml").touch()
    (root / "an experiment.toml").write_text("\ufeff[train_unet.named.guide]\nupdates = 3\n", encoding="utf-8")
    folders = " ".join(f"[{stage}]={folder}" for stage, folder in STAGE_FOLDERS.items())
    executable(root / ".venv" / "bin" / "python", PYTHON.replace("FOLDERS", folders).replace("REAL", sys.executable))
    return root


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment(house: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_", "MLFLOW"))}
    inherited.pop("ACCELERATE_USE_CPU", None)
    return {**inherited, "RECORDS": str(house / "records"), "PYTHONPATH": str(ROOT), **more}


def run(house: Path, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(house / script), *words]
    return subprocess.run(
        command, cwd=house, env=environment(house, **more), capture_output=True, text=True, timeout=200
    )


def launches(house: Path) -> list[list[str]]:
    """The words that reached accelerate, launch by launch."""
    return [path.read_text().splitlines() for path in sorted((house / "records").iterdir())]


def launched_stages(house: Path) -> list[str]:
    return [words[words.index("-m") + 1].removeprefix("pipelines.") for words in launches(house)]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


# launch/pipeline.sh


def test_the_pipeline_runs_every_stage_in_order_and_says_where_the_results_are(house: Path) -> None:
    done = run(house, "launch/pipeline.sh", "an experiment.toml")
    assert done.returncode == 0, done.stderr
    found = [" ".join(words[words.index("-m") + 1 :]).removeprefix("pipelines.") for words in launches(house)]
    assert found == [f"{stage} --config an experiment.toml" for stage in GUIDED]
    # Absolute, so that what is printed works from any folder.
    assert (house / "synced").read_text() == f"{house}/runs/a b\n"
    assert f"{house}/runs/a b/evaluation/samples.png" in done.stdout
    assert f"{house}/runs/a b/evaluation/metrics.json" in done.stdout
    store = str(house / "runs" / "mlflow.db").replace(" ", "\\ ")
    assert f"mlflow ui --backend-store-uri sqlite:///{store}" in done.stdout


def test_the_pipeline_ends_with_the_stage_s_own_exit_code_and_starts_nothing_after_it(house: Path) -> None:
    done = run(house, "launch/pipeline.sh", "x.toml", STAGE_DOES="[[ $stage != train_vae ]] || { outcome 75; exit 1; }")
    assert done.returncode == 75
    assert launched_stages(house) == STAGES[:2]


@pytest.mark.parametrize(("code", "continues"), [(1, True), (2, False), (75, True)])
def test_the_reason_is_the_pipeline_s_last_word_and_a_mistake_does_not_continue(
    house: Path, code: int, continues: bool
) -> None:
    stage = f"""printf '{{"exit_code": {code}, "reason": "no such folder"}}' >"$folder/outcome.json"; exit 1"""
    done = run(house, "launch/pipeline.sh", "x.toml", STAGE_DOES=stage)
    assert done.returncode == code
    assert f"prepare_corpus ended with exit code {code} after" in done.stderr
    assert " s: no such folder\n" in done.stderr
    assert ("The same command continues" in done.stderr) == continues
    assert ("has to be mended first" in done.stderr) == (not continues)


def test_an_outcome_of_an_earlier_run_does_not_explain_a_failure_of_this_one(house: Path) -> None:
    old = house / "runs" / "a b" / "corpus" / "outcome.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"exit_code": 75}))
    assert run(house, "launch/pipeline.sh", "x.toml", STAGE_DOES="exit 3").returncode == 1


def test_an_outcome_explains_a_failure_whatever_the_clock_of_its_file_server_says(house: Path) -> None:
    stage = 'outcome 75; touch -d "2001-01-01" "$folder/outcome.json"; exit 1'
    assert run(house, "launch/pipeline.sh", "x.toml", STAGE_DOES=stage).returncode == 75


def test_mistakes_of_all_stages_are_shown_before_the_first_one_works(house: Path) -> None:
    done = run(house, "launch/pipeline.sh", "x.toml", MISTAKEN="train_unet evaluate")
    assert done.returncode == 2
    assert "train_unet: a mistake" in done.stderr
    assert "evaluate: a mistake" in done.stderr
    assert launches(house) == []


@pytest.mark.parametrize(
    ("gpus", "flags", "file", "processes"),
    [
        ("0", [], "cpu.yaml", 2),
        ("0", ["--num_processes", "1"], "cpu.yaml", 1),
        ("1", [], "single_gpu.yaml", 1),
        ("4", [], "multi_gpu.yaml", 4),
        ("4", ["--num_processes=3"], "multi_gpu.yaml", 3),
        ("4", ["--config_file", str(ROOT / "launch/accelerate/single_gpu.yaml")], "single_gpu.yaml", 1),
    ],
)
def test_the_pipeline_uses_the_machine_it_finds_unless_told_otherwise(
    house: Path, gpus: str, flags: list[str], file: str, processes: int
) -> None:
    assert run(house, "launch/pipeline.sh", "x.toml", *flags, NUM_GPUS=gpus, STAGE_DOES="exit 1").returncode == 1
    (words,) = launches(house)
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    assert Path(arguments.config_file).name == file
    assert arguments.num_processes == processes


def test_options_after_two_dashes_reach_the_stages(house: Path) -> None:
    run(house, "launch/pipeline.sh", "x.toml", "--num_processes", "2", "--", "--run.root", "b c")
    assert len(launches(house)) == len(STAGES)
    assert all(words[-4:] == ["--config", "x.toml", "--run.root", "b c"] for words in launches(house))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_one_stop_file_and_the_checkpointed_stage_ends_the_pipeline(
    house: Path, number: signal.Signals
) -> None:
    stage = 'trap "exit 9" TERM INT HUP; until [[ -e $folder/stop ]]; do sleep 0.05; done; outcome 75; exit 1'
    command = ["bash", str(house / "launch" / "pipeline.sh"), "x.toml"]
    pipeline = subprocess.Popen(
        command, cwd=house, env=environment(house, STAGE_DOES=stage), start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for(house / "runs" / "a b" / "corpus")
    # As a terminal does it: to the whole process group. The stage is not in it.
    os.killpg(pipeline.pid, number)
    assert pipeline.wait(timeout=120) == 75
    assert launched_stages(house) == STAGES[:1]


def test_no_stage_begins_after_a_request_to_stop_that_came_too_late_for_the_one_before(house: Path) -> None:
    command = ["bash", str(house / "launch" / "pipeline.sh"), "x.toml"]
    stage = "until [[ -e $folder/stop ]]; do sleep 0.05; done; outcome 0"
    pipeline = subprocess.Popen(command, cwd=house, env=environment(house, STAGE_DOES=stage), stderr=subprocess.DEVNULL)
    wait_for(house / "runs" / "a b" / "corpus")
    pipeline.terminate()
    assert pipeline.wait(timeout=120) == 75
    assert launched_stages(house) == STAGES[:1]


def test_a_stage_that_ends_while_a_trap_runs_keeps_its_code() -> None:
    source = f"root=x python=x; . '{ROOT}/launch/stages.sh'; (exit 3) & wait $!; code=143; settle_code $!; echo $code"
    assert subprocess.run(["bash", "-c", source], capture_output=True, text=True).stdout == "3\n"


def test_a_second_signal_reaches_the_launcher(house: Path) -> None:
    stage = 'trap "touch terminated; exit 1" TERM; touch started; while true; do sleep 0.05; done'
    command = ["bash", str(house / "launch" / "pipeline.sh"), "x.toml"]
    pipeline = subprocess.Popen(command, cwd=house, env=environment(house, STAGE_DOES=stage), stderr=subprocess.DEVNULL)
    wait_for(house / "started")
    pipeline.terminate()
    wait_for(house / "runs" / "a b" / "corpus" / "stop")
    pipeline.terminate()
    assert pipeline.wait(timeout=120) == 1
    assert (house / "terminated").exists()


# launch/replicate.sh


def test_replicates_train_with_the_next_seeds_beside_the_run_and_evaluate_each(house: Path) -> None:
    words = ("an experiment.toml", "2", "--num_processes", "1", "--", "--run.experiment", "e")
    done = run(house, "launch/replicate.sh", *words)
    assert done.returncode == 0, done.stderr
    behind = [words[words.index("-m") + 1 :] for words in launches(house)]
    options = ["--config", "an experiment.toml", "--run.experiment", "e"]
    assert behind == [
        each
        for seed in ("4", "5")
        for each in (
            ["pipelines.train_unet", *options, "--seed", seed, "--name", f"seed_{seed}"],
            [
                *("pipelines.evaluate", *options, "--inputs.unet", f"runs/a b/unet-seed_{seed}"),
                *("--name", f"seed_{seed}"),
            ],
        )
    ]
    assert (house / "synced").read_text() == "runs/a b\n"
    assert (house / "compared").read_text() == "runs/a b/evaluation\n"


def test_a_replicate_that_stops_ends_the_script_with_its_code_and_the_command_to_continue(house: Path) -> None:
    done = run(house, "launch/replicate.sh", "x.toml", "3", STAGE_DOES="outcome 75; exit 1")
    assert done.returncode == 75
    assert "The same command continues from there:" in done.stderr
    assert "replicate.sh x.toml 3" in done.stderr
    assert launched_stages(house) == ["train_unet"]
    assert not (house / "compared").exists()


@pytest.mark.parametrize("words", [(), ("x.toml",), ("x.toml", "0"), ("no.toml", "2"), ("x.toml", "--cpu")])
def test_replicates_need_an_experiment_and_a_number_of_seeds(house: Path, words: tuple[str, ...]) -> None:
    done = run(house, "launch/replicate.sh", *words)
    assert done.returncode == 2
    assert "bash launch/replicate.sh EXPERIMENT.toml SEEDS" in done.stderr
    assert launches(house) == []


# launch/node.sh


def test_the_machines_of_one_job_agree_on_everything_but_their_rank(house: Path) -> None:
    for rank in range(3):
        run(
            house,
            "launch/node.sh",
            *("train_unet", "--config", "x.toml"),
            **{"PET_NNODES": "3", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "2345"},
            NUM_GPUS="4",
        )
    seen = [_validate_launch_command(launch_command_parser().parse_args(words))[0] for words in launches(house)]
    assert [arguments.machine_rank for arguments in seen] == [0, 1, 2]
    for arguments in seen:
        assert (arguments.num_machines, arguments.num_processes) == (3, 12)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("10.0.0.1", 2345)
        assert arguments.rdzv_backend == "static"
        assert arguments.multi_gpu
        assert not arguments.use_cpu


def test_more_processes_than_cores_are_named_and_started_all_the_same(house: Path) -> None:
    done = run(house, "launch/node.sh", "train_unet", "--config", "x.toml", PET_NPROC_PER_NODE="10000")
    assert done.returncode == 0
    assert "10000 processes will share " in done.stderr
    assert len(launches(house)) == 1


def test_several_machines_without_an_address_are_refused_with_advice(house: Path) -> None:
    done = run(house, "launch/node.sh", "train_unet", "--config", "x.toml", PET_NNODES="2")
    assert done.returncode == 2
    assert "PET_NNODES = 2, but PET_MASTER_ADDR does not say where machine 0 is" in done.stderr
    assert launches(house) == []


# launch/slurm


@pytest.fixture
def slurm(house: Path) -> Path:
    """Stand-ins for the four commands of Slurm that the scripts use; each records its words."""
    commands = house / "commands"
    commands.mkdir()
    executable(commands / "srun", '#!/usr/bin/env bash\nshift\nSLURM_NODEID=0 exec "$@"\n')
    executable(
        commands / "scontrol",
        """#!/usr/bin/env bash
case $2 in
    hostnames) printf 'n1\\nn2\\n' ;;
    node) echo "   NodeAddr=10.0.0.7 NodeHostName=n1" ;;
    *) echo "$*" >>"$RECORDS/../scontrol" ;;
esac
""",
    )
    executable(
        commands / "sbatch",
        '#!/usr/bin/env bash\necho "$*" >>"$RECORDS/../sbatch"; echo "$(wc -l <"$RECORDS/../sbatch");cluster"\n',
    )
    return house


def job_environment(slurm: Path, stage_does: str) -> dict[str, str]:
    return environment(
        slurm,
        PATH=f"{slurm / 'commands'}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(slurm),
        SLURM_JOB_ID="70123",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="n[1-2]",
        STAGE_DOES=stage_does,
    )


def start_job(slurm: Path, stage_does: str) -> subprocess.Popen[bytes]:
    # Slurm runs a copy from its spool folder.
    shutil.copy(slurm / "launch" / "slurm" / "stage.sbatch", slurm / "slurm_script")
    command = ["bash", str(slurm / "slurm_script"), "train_unet", "--config", "x.toml"]
    return subprocess.Popen(command, cwd=slurm, env=job_environment(slurm, stage_does), stderr=subprocess.DEVNULL)


UNTIL_STOPPED = "until [[ -e $folder/stop ]]; do sleep 0.05; done; outcome 75; exit 1"


def test_slurm_s_warning_stops_the_stage_and_requeues_the_job(slurm: Path) -> None:
    job = start_job(slurm, UNTIL_STOPPED)
    wait_for(slurm / "runs" / "a b" / "unet")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 75
    assert (slurm / "scontrol").read_text() == "requeue 70123\n"


def test_a_stop_file_made_by_hand_ends_the_job_for_good(slurm: Path) -> None:
    job = start_job(slurm, UNTIL_STOPPED)
    wait_for(slurm / "runs" / "a b" / "unet")
    (slurm / "runs" / "a b" / "unet" / "stop").touch()
    assert job.wait(timeout=120) == 75
    assert not (slurm / "scontrol").exists()


@pytest.mark.parametrize(("stage_does", "code"), [("outcome 0", 0), ("outcome 2; exit 1", 2), ("exit 1", 1)])
def test_the_job_ends_with_the_stage_s_own_exit_code(slurm: Path, stage_does: str, code: int) -> None:
    assert start_job(slurm, stage_does).wait(timeout=120) == code
    assert not (slurm / "scontrol").exists()
    (words,) = launches(slurm)
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    assert (arguments.num_machines, arguments.num_processes, arguments.main_process_ip) == (2, 2, "10.0.0.7")


def test_submitted_stages_wait_for_each_other(slurm: Path) -> None:
    path = f"{slurm / 'commands'}:{os.environ['PATH']}"
    done = run(
        slurm, "launch/slurm/submit.sh", "an experiment.toml", "--nodes", "4", "--", "--run.root", "b", PATH=path
    )
    assert done.returncode == 0, done.stderr
    lines = (slurm / "sbatch").read_text().splitlines()
    words = [line.split("stage.sbatch ")[1] for line in lines]
    assert words == [f"{stage} --config an experiment.toml --run.root b" for stage in GUIDED]
    assert "--dependency" not in lines[0]
    for number, line in enumerate(lines[1:], start=1):
        assert f"--dependency afterok:{number} --kill-on-invalid-dep=yes" in line
    # The last --nodes counts for sbatch.
    assert [line.split("--nodes ")[-1][0] for line in lines] == ["1", "4", "4", "4", "4", "4"]


def test_nothing_is_submitted_when_a_later_stage_has_a_mistake(slurm: Path) -> None:
    path = f"{slurm / 'commands'}:{os.environ['PATH']}"
    done = run(slurm, "launch/slurm/submit.sh", "x.toml", PATH=path, MISTAKEN="evaluate")
    assert done.returncode == 2
    assert not (slurm / "sbatch").exists()
