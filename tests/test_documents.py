"""What the documents promise: every command parses, every link leads somewhere, the front page is short."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY, run_here

DOCUMENTS = sorted(
    path
    for path in (*REPOSITORY.glob("*/README.md"), REPOSITORY / "README.md", REPOSITORY / ".github" / "CONTRIBUTING.md")
    if not path.parent.name.startswith(".venv")
)


def test_the_front_page_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        place, _, anchor = target.partition("#")
        found = (document.parent / place).resolve() if place else document
        found = found / "README.md" if found.is_dir() else found
        assert found.is_file(), f"{document}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles], target


def commands_of(document: Path) -> list[list[str]]:
    """The commands of a document's bash blocks, and of its text where they begin with accelerate or bash."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    spans = [span for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text) if span.startswith(("accelerate ", "bash "))]
    lines = [line for block in blocks for line in block.splitlines()] + [" ".join(span.split()) for span in spans]
    parts = [part for line in lines for part in re.split(r" && ", line)]
    commands = [shlex.split(part, comments=True) for part in parts]
    # Words in capitals and dots are placeholders of a pattern.
    whole = [words for words in commands if not any("..." in word or word.isupper() for word in words)]
    return [words for words in whole if len(words) > (2 if words[0] == "accelerate" else 1)]


COMMANDS = [pytest.param(words, id=" ".join(words)[:80]) for path in DOCUMENTS for words in commands_of(path)]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_parses(words: list[str]) -> None:
    """Stages and tools print the configuration that the words give; scripts are there; launchers know their flags."""
    words = [word.replace("mine.toml", "pipelines/configs/fashion_mnist.toml") for word in words]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "bash":
        script = REPOSITORY / rest[0]
        assert script.is_file(), script
        assert all((REPOSITORY / word).is_file() for word in rest[1:] if word.endswith(".toml"))
        return
    if program == "accelerate":
        known = launch_command_parser().parse_args(rest[1:])
        assert not known.config_file or (REPOSITORY / known.config_file).is_file()
        module, rest = known.training_script, known.training_script_args
    elif program.endswith("latentline"):
        module, rest = rest[0], rest[1:]
    else:
        assert program in ("pip", "docker", "cp", "debootstrap", "buildah", ".venv/bin/mlflow") or "=" in program, (
            program
        )
        return
    name = module.split(".")[-1]
    if "--config" in rest:
        at = rest.index("--config") + 1
        rest[at] = str(REPOSITORY / rest[at])
    done = run_here(name, *rest, "--print-config", config=None)
    assert done.returncode == 0, done.stderr
    assert f"[{name}]" in done.stdout
