"""One ruler for the library: complexity by radon, length of functions and files, lines in all.

    python .ci/ruler.py [FOLDER]

Prints every offence with its place and exits with status 1 where there is one.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from radon.complexity import cc_visit

MOST_COMPLEX, MEAN_COMPLEX = 10, 3.0
LONGEST_FUNCTION, LONGEST_FILE = 50, 400
ALL_LINES = 41_952
"""A ratchet: lower it with every change that makes the library shorter. The aim is 14,500, commands/ left out."""


def offences(root: Path) -> Iterator[str]:
    """Yield what exceeds a limit, with the file, the line and the number."""
    complexities, n_lines = [], 0
    for file in sorted(root.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        n_lines += (length := len(source.splitlines()))
        if length > LONGEST_FILE:
            yield f"{file}: {length} lines, at most {LONGEST_FILE}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (size := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                yield f"{file}:{node.lineno}: {node.name} has {size} lines, at most {LONGEST_FUNCTION}"
        for block in cc_visit(source):
            complexities.append(block.complexity)
            if block.complexity > MOST_COMPLEX:
                yield f"{file}:{block.lineno}: {block.name} has complexity {block.complexity}, at most {MOST_COMPLEX}"
    mean = statistics.fmean(complexities)
    print(f"{n_lines:,} lines, mean complexity {mean:.2f}")
    if mean > MEAN_COMPLEX:
        yield f"{root}: mean complexity {mean:.2f}, at most {MEAN_COMPLEX}"
    if n_lines > ALL_LINES:
        yield f"{root}: {n_lines:,} lines, at most {ALL_LINES:,}"


if __name__ == "__main__":
    found = list(offences(Path(sys.argv[1] if len(sys.argv) > 1 else "moe_gpt")))
    print("\n".join(found))
    sys.exit(bool(found))
