"""Entry of the tools: ``latentline TOOL ...`` is ``python -m pipelines.tools.TOOL ...``.

latentline                                              list the tools
latentline plan --config pipelines/configs/demo.toml    run one; --help shows its options
"""

import ast
import importlib
import sys
from pathlib import Path

from pipelines.runtime.config.logs import print_answer


def main() -> int:
    """Run the tool that the command line names; return the exit code."""
    tools, words = tools_and_purposes(), sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, tools))
        usage = "usage: latentline TOOL [--help] [--config EXPERIMENT.toml] [--dotted.name value ...] [--json]\n"
        print_answer("latentline", "\n".join([usage, *(f"  {name:<{width}}  {what}" for name, what in tools.items())]))
        return 0
    name = words[0].replace("-", "_")
    if name not in tools:
        from pipelines.runtime.config.mistakes import nearest  # late: the list of tools is to come at once

        hint = nearest(name, list(tools)) or "."
        print(f"latentline: no tool {words[0]!r}{hint} Tools are {', '.join(tools)}.", file=sys.stderr)
        return 2
    sys.argv = [f"latentline {name}", *words[1:]]
    return int(importlib.import_module(f"pipelines.tools.{name}").main())


def tools_and_purposes() -> dict[str, str]:
    """Return the first line of each tool's docstring by its name, read without importing it."""
    trees = {path.stem: ast.parse(path.read_bytes()) for path in sorted(Path(__file__).parent.glob("*.py"))}
    return {
        name: (ast.get_docstring(tree) or "").partition("\n")[0]
        for name, tree in trees.items()
        if name != Path(__file__).stem and any(getattr(node, "name", "") == "main" for node in tree.body)
    }


if __name__ == "__main__":
    sys.exit(main())
