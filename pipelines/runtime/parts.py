"""Work that falls into independent parts: shared among the ranks, resumable part by part, free of collectives.

A part is done when its record is committed as ``parts/NAME.json``. Whoever makes a part commits its files first, then
the record; killed in between, the part is made again and its files, equal in every byte, are renamed over.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.commit import sweep_temporaries, write_json
from pipelines.runtime.stage import Stage, Stopped

POLL_SECONDS = 0.05

Record = Mapping[str, Any]


def make_parts(
    stage: Stage,
    names: Sequence[str],
    make: Callable[[str], Record],
    *,
    folder: Path | None = None,
    after_each: Callable[[int, Record], None] | None = None,
) -> list[Record]:
    """Make the parts that are missing, this rank its share of them, and return all records in the order of ``names``.

    Args:
        stage: The running stage.
        names: One a part; safe as file names. Long parts first keeps the ranks busy to the end.
        make: Makes one part and returns its record: plain JSON.
        folder: Where the records are kept; default ``parts`` in the stage's folder.
        after_each: Told of each part that this rank made, with the number of parts that are done.

    Raises:
        Stopped: This process was asked to stop; finished parts are kept.
    """
    folder = folder or stage.folder / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    if stage.is_main and folder.is_relative_to(stage.folder):
        sweep_temporaries(folder)  # elsewhere, another run may be writing
    rank, world_size = stage.accelerator.process_index, stage.accelerator.num_processes
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    if stage.is_main and 0 < len(missing) < len(names):
        stage.say(f"continuing: {len(names) - len(missing)} of {len(names)} parts are done")
    # Every rank takes its turn in the whole list, not in what it found missing: ranks may look at different moments.
    mine = set(names[rank::world_size])
    for name in missing:
        if name not in mine:
            continue
        _stop_if_asked(stage)
        record = make(name)
        write_json(folder / f"{name}.json", record)
        if after_each is not None:
            after_each(sum((folder / f"{name}.json").exists() for name in names), record)
    while any(not (folder / f"{name}.json").exists() for name in names):
        _stop_if_asked(stage)
        time.sleep(POLL_SECONDS)
    return [json.loads((folder / f"{name}.json").read_bytes()) for name in names]


def _stop_if_asked(stage: Stage) -> None:
    if stage.stop.asked():
        stage.stop.tell_everyone()
        raise Stopped(f"{stage.stop.reason}; finished parts are kept")
