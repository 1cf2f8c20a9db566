"""Quarantine: bad samples that are left out, counted by reason, listed in a report, and held to a budget."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from data.files import write_atomically
from data.manifest import FileEntry
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.stage.work_items import Result

BadSamplePolicy = Literal["strict", "quarantine"]
REPORTED = ("shard", "key", "member", "reason", "detail")  # fields of a sample's line in the report
REPORT_NAME = "quarantine.jsonl"
FEW_BAD = 5


def settle_quarantine(
    stage: Stage, results: Sequence[Result], *, num_in: int, max_bad_fraction: float, free: Collection[str] = ()
) -> Counter[str]:
    """Write the report of all items' quarantined samples and return their number by reason.

    Samples with a reason in ``free`` were dropped by choice, not because they are bad: the budget does not count them.
    It allows a few of a small corpus, too, unless it is 0.

    Raises:
        ConfigError: There are more than the budget allows; the report is written all the same.
    """
    reports = [report for result in results for report in result["quarantined"]]
    counts = Counter(report["reason"] for report in reports)
    if stage.is_main and reports:
        lines = "".join(json.dumps(report, ensure_ascii=False) + "\n" for report in reports)
        write_atomically(stage.folder / REPORT_NAME, lines.encode(errors="backslashreplace"))
        stage.tracker.log_artifact(stage.folder / REPORT_NAME)
    bad = sum(count for reason, count in counts.items() if reason not in free)
    if bad > (max_bad_fraction and max(max_bad_fraction * num_in, FEW_BAD)):
        for result in results if stage.is_main else ():
            if result["quarantined"]:  # looked at again by the next start, when the samples may have been mended
                (stage.folder / "parts" / f"{result['entry']['name']}.json").unlink(missing_ok=True)
        raise ConfigError(
            f"{bad} of {num_in} samples are bad ({dict(counts)}), more than {stage.name}.max_bad_fraction = "
            f"{max_bad_fraction} allows. {stage.folder / REPORT_NAME} lists them; mend the corpus or raise the budget."
        )
    return counts


def files_and_counts(
    results: Sequence[Result],
    quarantined: Counter[str],
    *,
    num_in: int,
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Return the shards that hold samples, and a manifest's counts: every sample is stored or counted as bad.

    Args:
        results: Of all items.
        quarantined: Bad samples by reason.
        num_in: Number of samples.
        left_out: What was given besides, by suffix or name; it is counted as given and not as stored.
    """
    files = [FileEntry(**result["entry"]) for result in results if result["entry"]["samples"]]
    num_out = sum(entry.samples for entry in files)
    assert num_in == num_out + quarantined.total(), "a sample was lost without being counted"
    counts = {
        "in": num_in + sum(left_out.values()),
        "out": num_out,
        "quarantined": dict(sorted(quarantined.items())),
        **({"left_out": dict(sorted(left_out.items()))} if left_out else {}),
    }
    return files, counts
