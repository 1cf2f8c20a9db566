"""Verification of inputs: every shard that a stage reads is the one its manifest names."""

from pathlib import Path

from data.shards.remote import is_remote
from data.shards.verification import verify_shard
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.launch import any_rank
from pipelines.runtime.stage.stage import Stage


def verify_shards(stage: Stage, name: str) -> None:
    """Check the local shards of ``inputs.NAME``, those that others wrote too, each rank its share; a collective.

    Shards behind a URL are checked as they are fetched.

    Raises:
        ConfigError: On every rank, when one found a shard that is not the one of its manifest.
    """
    folder: str = getattr(stage.config.inputs, name)  # type: ignore[attr-defined]
    manifest = stage.parents[name]
    local = [entry for entry in manifest.files if not is_remote(entry.url)]
    problem = ""
    for entry in local[stage.accelerator.process_index :: stage.accelerator.num_processes]:
        try:
            verify_shard(Path(folder), entry)
        except (ValueError, OSError) as error:
            problem = str(error)
            break
    if any_rank(bool(problem), stage.accelerator):
        raise ConfigError(f"inputs.{name}: {problem or 'another process found a shard that is not what it should be'}")
