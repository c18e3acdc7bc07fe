"""Print the size of the code, in lines as `ruff format` lays it out, and what is too long."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def size(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


package = sorted(ROOT.glob("jettclip/**/*.py"))
code = package + [
    path for path in ROOT.glob("*/*.py") if path.parts[-2] in ("notebooks", "report", "workflow")
]
print(f"jettclip/: {size(package)} lines of 4200")
print(f"with notebooks/*.py, report/ and workflow/: {size(code)} lines of 5200")
print(f"tests/: {size(ROOT.glob('tests/**/*.py'))} lines of 4600")
for path in code:
    name = path.relative_to(ROOT)
    if size([path]) > 350:
        print(f"{name} has {size([path])} lines; 350 are the most")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        length = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.FunctionDef) and length > 80:
            print(f"{name}: {node.name} has {length} lines; 80 are the most")
