"""Laws of the configuration: one tree, strict types, every mistake at once, each with where and what to do."""

import json
import re
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_type_hints

import pytest
from clocks import processor_seconds_of
from conftest import REPOSITORY, SMOKE, STAGES, environment, run_stage
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.evaluate import EvaluateConfig
from pipelines.evaluation.samples import EvaluateInputs
from pipelines.runtime.config.command_line import config_from_command_line, help_text
from pipelines.runtime.config.dotted_keys import flattened, flattened_texts
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import config_as_toml, early_folder, load_config
from pipelines.runtime.config.renamed_keys import RENAMED_KEYS, with_new_names
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.tools.plan import StageConfigs
from pipelines.train_unet import TrainUNetConfig
from pipelines.train_vae import TrainVAEConfig


class Circle(BaseModel, frozen=True, extra="forbid"):
    """Round."""

    kind: Literal["circle"] = "circle"  # no corners
    radius: PositiveFloat = 1.0  # metres


class Square(BaseModel, frozen=True, extra="forbid"):
    """Four corners."""

    kind: Literal["square"] = "square"  # four corners
    side: PositiveInt = 2  # metres


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Inputs(BaseModel, frozen=True, extra="forbid"):
    corpus: str  # folder


class Config(StageConfig):
    fingerprint_ignores: ClassVar[frozenset[str]] = frozenset()

    inputs: Inputs  # where
    shape: Shape = Circle(radius=5.0)  # what is drawn
    shapes: tuple[Shape, ...] = ()  # several
    global_batch: PositiveInt = 64  # images an update
    peak_lr: PositiveFloat = 1e-4  # per update
    name: str = "x"  # any text
    names: tuple[str, ...] = ()  # any texts
    interval: tuple[float, float] = (0.0, 1.0)  # from and to
    exact: bool = False  # slower

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.global_batch % 2:
            raise ValueError(f"global_batch = {self.global_batch} must be even")
        return self


def load(tmp_path: Path, text: str, *words: str) -> Config:
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return load_config(Config, table="train_vae", argv=["--config", str(path), *words])


def mistakes(tmp_path: Path, text: str, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *words)
    return str(error.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '[run]\nroot = "runs/a"\n[train_vae]\nglobal_batch = 32\npeak_lr = 1',
        *("--global-batch", "16", "--run.root=runs/b", "--train_vae.name", "7", "--exact"),
    )
    assert (config.global_batch, config.peak_lr, config.run.root, config.name, config.exact) == (
        16,
        1.0,
        "runs/b",
        "7",
        True,
    )


def test_a_list_of_plain_values_may_come_without_brackets_on_the_command_line(tmp_path: Path) -> None:
    assert load(tmp_path, "", "--names", "x-{0,1}.tar,y").names == ("x-{0,1}.tar", "y")
    words = ("--interval", "0.1, 0.85", "--names", "a b,7")
    assert (config := load(tmp_path, "", *words)).interval == (0.1, 0.85)
    assert config.names == ("a b", "7")
    assert load(tmp_path, "", "--names", "a").names == ("a",)
    assert load(tmp_path, "", "--names", '["a,b"]', "--interval", "[0.1, 0.85]").names == ("a,b",)
    # A file has lists of its own, and tables have commas within.
    assert "train_vae.interval = '0.1,0.85' (" in mistakes(tmp_path, '[train_vae]\ninterval = "0.1,0.85"')
    assert "train_vae.shapes = 'circle,circle' (command line)" in mistakes(tmp_path, "", "--shapes", "circle,circle")


def test_inputs_lie_below_the_root_unless_they_are_given(tmp_path: Path) -> None:
    assert load(tmp_path, "", "--run.root", "runs/z").inputs.corpus == "runs/z/corpus"
    assert load(tmp_path, "", "--inputs.corpus", "elsewhere").inputs.corpus == "elsewhere"
    words = ["--config", str(SMOKE), "--run.root", str(tmp_path)]

    def inputs(*more: str) -> EvaluateInputs:
        return load_config(EvaluateConfig, table="evaluate", argv=[*words, *more]).inputs

    assert inputs().latents == "", "an optional one that is not finished"
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").touch()
    assert inputs().latents == str(tmp_path / "latents")

    # A guide is one that the file names, whether it is finished or not.
    assert inputs().guide == ""
    words[1] = str(tmp_path / "guided.toml")
    Path(words[1]).write_text(SMOKE.read_text() + "\n[train_unet.named.guide]\nupdates = 3\n")
    folder = str(tmp_path / "unet-guide")
    assert inputs().guide == folder
    assert inputs("--inputs.guide", "").guide == ""
    assert inputs("--inputs.unet", folder).guide == "", "not of itself"


def test_a_partly_given_table_keeps_its_fields_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "", "--shape.radius", "2").shape == Circle(radius=2.0)
    assert load(tmp_path, "[train_vae.shape]\n").shape == Circle(radius=5.0)


@pytest.mark.parametrize(("number", "expected"), [(0, 0.0), (1, 0.0), (2, 0.1)])
def test_a_default_that_follows_from_other_keys_follows_from_those_given(
    number: int, expected: float, tmp_path: Path
) -> None:
    conditioners = ['{ kind = "class" }', '{ kind = "text" }'][:number]
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(f"[train_unet.denoiser]\nconditioners = [{', '.join(conditioners)}]")
    for _ in range(2):  # as written, and as resolved
        words = ["--config", str(experiment), "--updates", "1", "--global_batch", "1"]
        config = load_config(TrainUNetConfig, table="train_unet", argv=words)
        assert config.denoiser.joint_drop_probability == expected
        experiment.write_text(config_as_toml(config, table="train_unet"))


def test_a_changed_kind_drops_the_keys_of_the_old_variant(tmp_path: Path) -> None:
    text = '[train_vae]\nshape = { kind = "circle", radius = 3.0 }\nshapes = [{ kind = "square", side = 9 }]'
    assert load(tmp_path, text, "--shape.kind", "square").shape == Square()
    assert load(tmp_path, text, "--shape.kind", "square", "--shape.side", "4").shape == Square(side=4)
    assert load(tmp_path, text, "--shape.kind", "circle").shape == Circle(radius=3.0)
    assert load(tmp_path, text, "--shapes.0.side", "4").shapes == (Square(side=4),)
    # In any order of words, and where the file left the kind to the default.
    assert load(tmp_path, text, "--shape.side", "4", "--shape.kind", "square").shape == Square(side=4)
    assert load(tmp_path, "[train_vae]\nshape = { radius = 3.0 }", "--shape.kind", "square").shape == Square()


def test_all_mistakes_are_shown_at_once_with_source_and_advice(tmp_path: Path) -> None:
    text = (
        '[run]\nroott = "x"\n[train_vaee]\n[train_vae]\nglobal_bach = 3\npeak_lr = "fast"\n'
        'shape = { kind = "cirle" }\nshapes = [{ kind = "square", sid = 2 }]\nexact = 1\n'
    )
    message = mistakes(tmp_path, text, "--global-batch", "2.5", "--run.threads", "many", "stray")
    file = tmp_path / "experiment.toml"
    for phrase in (
        "10 mistakes in the configuration",
        f"[train_vaee] ({file})\n      no stage reads this table; did you mean train_vae?",
        f"run.roott = 'x' ({file})\n      unknown key; did you mean root?",
        f"train_vae.global_bach = 3 ({file})\n      unknown key; did you mean global_batch?",
        f"train_vae.peak_lr = 'fast' ({file})\n      expected a valid number",
        f"train_vae.shape.kind = 'cirle' ({file})\n      expected one of 'circle', 'square'; did you mean circle?",
        f"train_vae.shapes.0.sid = 2 ({file})\n      unknown key; did you mean side?",
        f"train_vae.exact = 1 ({file})\n      expected a valid boolean",
        "train_vae.global_batch = 2.5 (command line)\n      expected a valid integer",
        "run.threads = 'many' (command line)\n      expected a valid integer",
        "'stray' (command line)\n      a value without a name",
    ):
        assert phrase in message, f"{phrase}\n--- not in\n{message}"


OLD_KEYS = """
[train_unet]
updates = 1
global_batch = 2
self_test_every = 3
panel = { rows = 2, sampler = { kind = "ddim" } }
"""


def test_every_old_key_is_told_its_new_name_whatever_its_depth(tmp_path: Path) -> None:
    from pipelines.train_unet import TrainUNetConfig

    path = tmp_path / "experiment.toml"
    path.write_text(OLD_KEYS)
    words = ["--config", str(path), "--panel-every", "0", "--panel.guidance.scale", "2", "--train_unet.panel.rows", "4"]
    with pytest.raises(ConfigError) as error:
        load_config(TrainUNetConfig, table="train_unet", argv=words)
    for phrase in (
        "7 mistakes in the configuration",
        f"train_unet.panel.rows = 2 ({path})\n      unknown key; it is called train_unet.grid.rows now",
        f"train_unet.panel.sampler.kind = 'ddim' ({path})\n      unknown key; it is called train_unet.grid.sampler",
        f"train_unet.self_test_every = 3 ({path})\n      unknown key; it is called train_unet.replica_check_every now",
        "train_unet.panel_every = '0' (command line)\n      unknown key; it is called train_unet.validate_every now",
        "train_unet.validate_every = 0 (command line)\n      expected greater than 0",  # checked under its new name
        "train_unet.panel.guidance.scale = '2' (command line)\n      unknown key; it is called train_unet.grid",
        "train_unet.panel.rows = '4' (command line)\n      unknown key; it is called train_unet.grid.rows now",
    ):
        assert phrase in str(error.value), f"{phrase}\n--- not in\n{error.value}"


def test_old_names_become_new_ones_whatever_else_the_configuration_holds() -> None:
    old = {"panel": {"rows": 2}, "panel_every": 5, "seed": 3}
    assert with_new_names("train_unet", old) == {"grid": {"rows": 2}, "validate_every": 5, "seed": 3}
    assert with_new_names("train_vae", old) == {"panel": {"rows": 2}, "validate_every": 5, "seed": 3}
    assert with_new_names("evaluate", old) == old
    assert old == {"panel": {"rows": 2}, "panel_every": 5, "seed": 3}


@pytest.mark.parametrize("stage", list(RENAMED_KEYS))
def test_every_new_name_is_a_key_and_no_old_one_is(stage: str) -> None:
    import importlib

    from pipelines.runtime.config.schema import annotation_at

    module = importlib.import_module(f"pipelines.{stage}")
    (model,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == module.__name__
    ]
    for old, new in RENAMED_KEYS[stage].items():
        assert annotation_at(model, {}, old.split(".")) is None
        assert annotation_at(model, {}, new.split(".")) is not None


def test_a_number_in_quotes_is_no_number_in_a_file(tmp_path: Path) -> None:
    assert "expected a valid integer" in mistakes(tmp_path, '[train_vae]\nglobal_batch = "32"')


def test_values_are_checked_across_fields(tmp_path: Path) -> None:
    assert "global_batch = 3 must be even" in mistakes(tmp_path, "", "--global_batch", "3")


@pytest.mark.parametrize(("stage", "model"), [("train_vae", TrainVAEConfig), ("train_unet", TrainUNetConfig)])
def test_a_flip_probability_above_one_is_refused(stage: str, model: type[StageConfig]) -> None:
    with pytest.raises(ConfigError, match=r"flip_probability = 50\b"):
        load_config(model, table=stage, argv=["--config", str(SMOKE), "--flip_probability", "50"])


@pytest.mark.parametrize(
    ("value", "flaw"),
    [
        *((text, "is not finite") for text in ("inf", "-inf", "nan", "1e400")),
        *((text, "needs more than 64 bits") for text in (str(2**64), str(-(2**63)), "0x" + "f" * 5000)),
    ],
)
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_number_that_files_and_stores_cannot_hold_is_refused_at_every_key(
    stage: str, value: str, flaw: str, tmp_path: Path
) -> None:
    model = get_type_hints(StageConfigs)[stage]
    whole = load_config(model, table=stage, argv=["--config", str(SMOKE)]).model_dump(mode="json")
    numbers = {
        key: f"[{value}]" if isinstance(leaf, list) else value
        for key, leaf in flattened(whole).items()
        for number in (leaf[:1] if isinstance(leaf, list) else [leaf])
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
    assert numbers
    with pytest.raises(ConfigError) as error:
        words = (f"--{key}={text}" for key, text in numbers.items())
        load_config(model, table=stage, argv=["--config", str(SMOKE), *words])
    said = [head + advice for head, advice in pairwise(str(error.value).splitlines()[1:])]
    for key, text in numbers.items():
        named = f"  {'' if key.startswith('run.') else stage + '.'}{key}{'.0' * text.startswith('[')} = "
        assert any(line.startswith(named) and line.endswith(f"; this {flaw}") for line in said), f"{named}\n{said}"

    table, _, key = next(iter(numbers)).rpartition(".")
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(f"[{table if table.startswith('run') else f'{stage}.{table}'.strip('.')}]\n{key} = {value}")
    with pytest.raises(ConfigError, match=f"this {flaw}"):
        load_config(model, table=stage, argv=["--config", str(experiment)])


@pytest.mark.parametrize(
    "value", ["9" * 5_000, "[" * 100_000, "[" * 900 + "]" * 900, "{a=" * 500 + "1" + "}" * 500, "x" * 100_000]
)
def test_a_value_too_long_or_too_deep_is_a_short_message(value: str, tmp_path: Path) -> None:
    for said in (
        mistakes(tmp_path, "", f"--global_batch={value}"),
        mistakes(tmp_path, f"[train_vae]\nglobal_batch = {value}"),
        mistakes(tmp_path, "", f"--{'a.' * 5_000}b", value),
    ):
        assert len(said) < 1_000 + len(str(tmp_path))
        assert "experiment.toml cannot be read as TOML" in said or "(command line)" in said


def test_an_empty_name_and_a_nul_character_are_refused_wherever_a_folder_is_named(tmp_path: Path) -> None:
    said = mistakes(tmp_path, '[run]\nroot = ""\nexperiment = ""\n[train_vae]\nname = "a\\u0000b"')
    for key, why in (
        ("run.root = ''", "should have at least 1 character"),
        ("run.experiment = ''", "should have at least 1 character"),
        (r"train_vae.name = 'a\x00b'", "expected a valid string; this holds a NUL character"),
    ):
        assert re.search(rf"  {re.escape(key)} \(.*\n      .*{why}", said), said


def test_a_file_that_is_no_experiment_is_the_only_mistake(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    said = mistakes(tmp_path, "[train_unet]\nupdates = = 3", "--stray", "1")
    assert said == f"--config {file} cannot be read as TOML: Invalid value (at line 2, column 11)"
    words = ["--config", str(file), "--run.root"]
    with pytest.raises(SystemExit):
        config_from_command_line(Config, table="train_vae", about="", argv=[*words, str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "vae" / "outcome.json").read_bytes())["exit_code"] == 2
    assert early_folder(Config, table="train_vae", argv=words[:2]) is None, "that of another experiment"


def test_a_name_takes_the_changes_that_the_file_has_for_it_and_the_command_line_wins(tmp_path: Path) -> None:
    text = """[train_vae]
    global_batch = 32
    shape = { kind = "square", side = 9 }
    shapes = [{ kind = "circle", radius = 3 }, { kind = "square" }]
    [train_vae.named.small]
    global_batch = 16
    peak_lr = 2
    shape.kind = "circle"
    shapes = [{ kind = "square", side = 4 }]
    [train_vae.named.first]
    shapes.0.radius = 7
    """
    plain, other = load(tmp_path, text), load(tmp_path, text, "--name", "wide")
    assert other.model_copy(update={"name": "x"}) == plain, "no changes of that name"
    small = load(tmp_path, text, "--name", "small", "--peak_lr", "3")
    assert (small.global_batch, small.peak_lr, small.name) == (16, 3.0, "small")
    assert small.shape == Circle(radius=5.0), "the default, without the square's side"
    assert small.shapes == (Square(side=4),)
    assert load(tmp_path, text, "--name", "first").shapes == (Circle(radius=7.0), Square())
    assert load(tmp_path, text, "--name", "small-seed_2").global_batch == 16, "a replicate of it"
    by_default = text.replace("[train_vae]", '[train_vae]\nname = "small"')
    assert load(tmp_path, by_default, "--name", "").global_batch == 32
    bare = text.replace('shapes = [{ kind = "circle", radius = 3 }, { kind = "square" }]', "")
    assert "has no shapes to change" in mistakes(tmp_path, bare, "--name", "first")
    assert load(tmp_path, by_default).global_batch == 16
    wrong = text.replace("peak_lr = 2", 'name = "big"\nrun.root = "r"\ncolour = 1\nshape.radius = "x"')
    assert load(tmp_path, wrong) == plain
    said = mistakes(tmp_path, wrong, "--name", "small")
    place = f"({tmp_path / 'experiment.toml'}, [train_vae.named.small])"
    assert f"  name {place}" in said
    assert f"  run.root {place}" in said
    assert f"colour = 1 {place}" in said
    assert "shape.radius" in said
    assert "expected tables [train_vae.named.NAME]" in mistakes(tmp_path, "[train_vae]\nnamed = [1]")


@pytest.mark.parametrize("text", ["[train_vae]\nupdates = = 3", "[train_vae]\nstray = 1"])
def test_a_mistake_in_a_named_variant_is_left_in_its_own_folder(text: str, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(text)
    words = ["--config", str(tmp_path / "e.toml"), "--run.root", "r", "--name", "wide"]
    assert early_folder(Config, table="train_vae", argv=words) == Path("r/vae-wide")
    assert early_folder(StageConfig, table="train_vae", argv=words) == Path("r/vae"), "of a stage without names"


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    assert "cannot be read as TOML" in mistakes(tmp_path, "x = [")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(Config, table="train_vae", argv=["--config", str(tmp_path / "none.toml")])
    with pytest.raises(ConfigError, match="--config EXPERIMENT.toml"):
        load_config(Config, table="train_vae", argv=[])


def test_a_flag_without_a_value_is_only_for_booleans(tmp_path: Path) -> None:
    assert "--peak_lr (command line)\n      needs a value" in mistakes(tmp_path, "", "--peak_lr")


def test_the_printed_configuration_gives_itself_back(tmp_path: Path) -> None:
    text = '[train_vae]\nshape = { kind = "square", side = 9 }\nshapes = [{ kind = "circle" }]'
    config = load(tmp_path, text, "--run.root", "runs/q")
    assert load(tmp_path, config_as_toml(config, table="train_vae")) == config


def test_help_has_one_line_a_field_with_default_and_comment() -> None:
    lines = help_text(Config, table="train_vae", about="What it does.").splitlines()
    assert lines[0] == "What it does."
    assert any(line.split() == ["--global_batch", "64", "images", "an", "update"] for line in lines)
    assert any(line.split() == ["--shape.radius", "5.0", "metres"] for line in lines)
    assert any(line.split()[:2] == ["--inputs.corpus", "<run.root>/corpus"] for line in lines)
    (attention,) = (line for line in lines if line.startswith("  --run.attention "))
    assert attention.endswith(" (auto, sdpa, xformers, math)")


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_field_of_every_stage_has_its_comment(stage: str) -> None:
    import importlib

    from pipelines.runtime.config.schema import model_paths

    module = importlib.import_module(f"pipelines.{stage}")
    (model,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == module.__name__
    ]
    bare = [".".join((*path, name)) for path, name, _, comment in model_paths(model) if not comment]
    assert not bare, f"fields without a comment: {bare}"


def test_parameters_are_flattened_to_their_leaves() -> None:
    tree = {
        "a": {"b": 1, "c": {}},
        "kinds": [{"kind": "class", "dims": (1, 2)}],
        "name": "x",
        "on": True,
        "p": Path("/q"),
    }
    assert flattened_texts(tree) == {
        "a.b": "1",
        "a.c": "{}",
        "kinds.0.kind": "class",
        "kinds.0.dims": "[1, 2]",
        "name": "x",
        "on": "true",
        "p": '"/q"',
    }


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines" / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_experiment_is_valid_for_every_stage(path: Path) -> None:
    import importlib

    for stage in STAGES:
        module = importlib.import_module(f"pipelines.{stage}")
        (model,) = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == module.__name__
        ]
        words = ["--config", str(path)]
        load_config(model, table=stage, argv=words)
        if "name" in model.model_fields:
            load_config(model, table=stage, argv=[*words, "--name", "guide"])


def test_help_is_quick_and_loads_no_tracking_attention_diffusers_or_compiler() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['x', '--help']\n"
        "try: runpy.run_module('pipelines.train_unet', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('LOADED', sorted({'mlflow', 'xformers', 'diffusers', 'torch._dynamo'} & set(sys.modules)))\n"
    )
    ratio, here = 99.0, {"env": environment(), "cwd": REPOSITORY}
    for _ in range(3):
        seconds, done = processor_seconds_of([sys.executable, "-c", code], **here)
        assert done.stdout.rstrip().endswith("LOADED []"), done.stdout + done.stderr
        ratio = seconds / processor_seconds_of([sys.executable, "-c", "import torch, pydantic"], **here)[0]
        if ratio < 2.0:
            return
    # Two seconds where torch takes one; how fast the machine is at the moment cancels out.
    assert ratio < 2.0


def test_a_mistake_ends_with_code_2_before_any_work(tmp_path: Path) -> None:
    done = run_stage("train_unet", "--run.root", str(tmp_path / "run"), "--global_bach", "3", "--updates", "x")
    assert done.returncode == 2
    assert "2 mistakes in the configuration" in done.stderr
    assert "did you mean global_batch?" in done.stderr
    assert {p.name for p in (tmp_path / "run" / "unet").iterdir()} == {"lock", "outcome.json"}


def test_missing_inputs_are_all_named_with_the_stage_that_makes_them(tmp_path: Path) -> None:
    done = run_stage("train_unet", "--run.root", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "Run pipelines.encode_latents first" in done.stderr
    assert "Run pipelines.train_vae first" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_that_cannot_be_split_names_the_nearest_that_can() -> None:
    from pipelines.runtime.training.config import BatchShare
    from pipelines.train_unet import TrainUNetConfig

    whole = tomllib.loads(SMOKE.read_text())["train_unet"]
    config = TrainUNetConfig.model_validate({**whole, "inputs": {"latents": "l", "vae": "v"}, "global_batch": 50})
    with pytest.raises(ConfigError) as error:
        BatchShare.of(config, table="train_unet", rank=0, world_size=3)
    assert str(error.value) == (
        "train_unet.global_batch = 50 cannot be split into whole micro-batches: 3 processes x 8 images = 24. "
        "Use 48 or 72, or change train_unet.images_per_device or --num_processes."
    )


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 0), (1, 4), (2, 4), (4, 2), (3, 8)])
def test_the_shares_of_all_ranks_are_the_whole_batch_once(world_size: int, per_device: int) -> None:
    from pipelines.runtime.training.config import BatchShare
    from pipelines.train_unet import TrainUNetConfig

    config = TrainUNetConfig.model_validate(
        {"inputs": {"latents": "l", "vae": "v"}, "updates": 1, "global_batch": 48, "images_per_device": per_device}
    )
    seen: list[int] = []
    for rank in range(world_size):
        share = BatchShare.of(config, table="train_unet", rank=rank, world_size=world_size)
        pieces = [list(share.positions)[part] for part in share.micro_batches]
        assert len({len(piece) for piece in pieces}) == 1
        assert not per_device or len(pieces[0]) == per_device
        seen += [position for piece in pieces for position in piece]
    assert seen == list(range(48))


def test_a_byte_order_mark_before_an_experiment_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMOKE.read_bytes())
    argv = ["--config", str(path)]
    assert load_config(TrainVAEConfig, table="train_vae", argv=argv).updates == 24
