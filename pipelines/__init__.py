"""Pipeline: five stages, one module each, and the rooms they are made of.

In the order to read: a stage (``train_unet``), ``model`` (weights, captions, validation: what stages share about the
trained model), ``evaluation``, ``runtime`` (configuration, tracking, the frame of a stage, training), ``tools``.
It may import ``models`` and ``data``, its siblings, and checks that they are: other packages of these names, in the
working directory or on PYTHONPATH, would come first. Here, since stages and tools import them at once.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def check_siblings(home: Path) -> None:
    """End the process with code 2 where the packages ``models`` and ``data`` are not those in the folder ``home``."""
    for name in ("models", "data"):
        spec = find_spec(name)
        found = Path(spec.origin) if spec is not None and spec.origin else None
        if found is None or found.resolve() != (home / name / "__init__.py").resolve():
            other = found and (found.parent if found.name == "__init__.py" else found)
            print(
                f"latentline: {other or 'nothing'} shadows the package {home / name}. Start from another folder, set "
                "PYTHONSAFEPATH=1, which leaves the working directory out, or look at PYTHONPATH.",
                file=sys.stderr,
            )
            raise SystemExit(2)


check_siblings(Path(__file__).resolve().parents[1])
