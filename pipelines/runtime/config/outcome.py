"""Outcome of a stage's run, for scripts: ``outcome.json`` in its folder.

``accelerate launch`` makes 1 of every exit code, so this file holds the true one. Of the ranks of one run the first to
end writes it; those that end because of it do not write over it. No run writes into a folder that another one owns.
What the work itself ended by names its ``rank``: from that the sender of a main process that was killed after another
rank had failed knows that the run is FAILED.
"""

import json
import logging
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.files import FolderLock, write_json, write_json_once
from pipelines.runtime.config.errors import sentence
from pipelines.runtime.config.redaction import without_credentials

log = logging.getLogger("latentline.stage")

OUTCOME_NAME = "outcome.json"
EXIT_CODES = {"done": 0, "failed": 1, "stopped": 75}
State = Literal["done", "failed", "stopped"]


@dataclass
class Outcome:
    """End of the run as this process sees it; failed until it is known to be better."""

    state: State = "failed"
    code: int = 1
    reason: str = ""  # of a run that is not done, as its last message says it
    working: bool = False  # past the checks, in a folder of its own

    def set(self, state: State, *, code: int | None = None, reason: object = "") -> None:
        """Set the state with its reason, and ``code`` where it is not the state's own."""
        self.state, self.code = state, EXIT_CODES[state] if code is None else code
        self.reason = without_credentials(str(reason), queries=True)

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Write ``outcome.json``; become failed when another rank of this run has written it first.

        A run that ended before its work began writes it unless another run owns the folder. A disk that does not take
        it is only reported: what ended the run has been said, and is not to be hidden by this.

        Args:
            folder: The run's folder, whose outcome of an earlier run was removed when the work began.
            is_main: True on the main process; the others only write failures in the work.
        """
        if not is_main and not (self.working and self.state == "failed"):
            return
        path = folder / OUTCOME_NAME
        content = {
            "state": self.state,
            "exit_code": self.code,
            "reason": self.reason,
            "resume_command": resume_command(),
        }
        by = {"rank": int(os.environ.get("RANK", "0"))}
        try:
            if not self.working:
                with suppress(BlockingIOError), FolderLock(folder):  # another run may own the folder
                    write_json(path, content)
            elif not write_json_once(path, content | by) and self.state != "failed":
                self.set("failed", reason="another rank of the run has failed")
        except OSError as error:
            log.warning(f"{OUTCOME_NAME} cannot be written: {sentence(error)}")


def has_failed(folder: Path) -> bool:
    """Return whether a rank of the run in ``folder`` has failed in its work."""
    try:
        outcome = json.loads((folder / OUTCOME_NAME).read_bytes())
        return bool(outcome["state"] == "failed" and "rank" in outcome)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def resume_command() -> str:
    """Return the command that started this process, without passwords, for messages and outcome.json."""
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", None)
    words = ["python", "-m", module] if module else ["python", sys.argv[0]]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        words = ["accelerate", "launch", "[launcher flags]", "-m", str(module)]
    return without_credentials(" ".join([*words, *(shlex.quote(word) for word in sys.argv[1:])]), queries=True)
