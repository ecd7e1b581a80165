"""Reference pages made from the code, read as syntax trees: no stage is imported. A test holds them to it.

python -m workflow_scripts.reference.stages    # docs/stages.md and docs/schemas.md
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROLES = {"Input": "read", "Output": "written"}
MADE = "by `python -m workflow_scripts.reference.stages`; a test holds them together."
# Files whose columns are described, in the order of the workflow: heading, module, name of the schema.
TABLES = [
    ("`datasets/{dataset}/{split}/preferences.parquet`", "preferences/schema.py", "PREFERENCES"),
    ("`datasets/{dataset}/{split}/subset.parquet`", "preferences/schema.py", "SUBSET"),
    ("`datasets/{dataset}/{split}/images-*.parquet`", "preferences/schema.py", "IMAGES"),
    ("`rollouts/{track}/{policy}/seed{seed}/{test}/{shard}-{block}.parquet`", "rollouts/record.py", "ROLLOUT"),
    ("`scores/{track}/{policy}/seed{seed}/{test}.parquet`", "stages/score_rollouts.py", "SCORE"),
    ("`gallery/{track}/{policy}/seed{seed}/{test}.parquet`", "reporting/gallery.py", "GALLERY"),
]


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def stage_modules() -> list[tuple[str, ast.Module]]:
    """Name and syntax tree of every module that defines a stage, by name."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (PACKAGE / "stages").glob("*.py")}
    return sorted((name, tree) for name, tree in trees.items() if arguments_class(tree))


def arguments_class(tree: ast.Module) -> ast.ClassDef | None:
    """The class of a stage's arguments, None where the module has none."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and "StageArguments" in map(ast.unparse, node.bases):
            return node
    return None


def described_fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """(name, type, docstring) of every field of a class."""
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield ast.unparse(field.target), ast.unparse(field.annotation), str(text.value.value)


def stage_section(name: str, tree: ast.Module) -> str:
    """One stage: what it does, its command, its files."""
    node = arguments_class(tree)
    assert node is not None
    first, *rest = (ast.get_docstring(tree) or "").split("\n\n")
    commands = [part for part in rest if part.startswith("python -m")]
    prose = [part for part in rest if part not in commands]
    commands = [re.sub(r" {5,}", r" \\\n    ", command) for command in commands]  # wrapped as in the source
    rows = []
    for argument, kind, meaning in described_fields(node):
        role = next((said for mark, said in ROLES.items() if mark in kind), "")
        several = "several" if kind.startswith("list") else "optional" if kind.endswith("None") else ""
        rows.append(f"| `{argument}` | {' '.join(filter(None, (role, several)))} | {cell(meaning)} |")
    parts = [f"## {name}", first, *(f"```text\n{command}\n```" for command in commands), *prose]
    return "\n\n".join([*parts, "| argument | | |\n|---|---|---|\n" + "\n".join(rows)])


def stages_page() -> str:
    """docs/stages.md."""
    head = (
        f"# Stages\n\nMade from the stages' code {MADE}\n\n"
        "Every stage is a rule of the same name and a command line, `python -m workflow_scripts.stages.<stage> "
        "--help`. The workflow gives `--config` the keys that the stage uses, `--code_digest` and `--log_file`; by "
        "hand the last two may be left out. Beside its first output each writes a sidecar "
        "([provenance.md](provenance.md))."
    )
    return "\n\n".join([head, *(stage_section(name, tree) for name, tree in stage_modules())]) + "\n"


def schema_rows(module: str, name: str) -> tuple[list[str], str]:
    """Rows of the table of a schema's columns, and what must be said before it."""
    text = (PACKAGE / module).read_text(encoding="utf-8")
    lines = text.splitlines()
    (node,) = [
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    rows = []
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "pa.field"]
    for call in sorted(calls, key=lambda call: call.lineno):
        column = ast.literal_eval(call.args[0])
        kind = ast.unparse(call.args[1]).replace("pa.", "").replace("()", "")
        required = any(k.arg == "nullable" for k in call.keywords)
        before = lines[call.lineno - 2].strip()
        beside = re.search(r"  # (.*)$", lines[(call.end_lineno or call.lineno) - 1])
        meaning = beside[1] if beside else before.removeprefix("# ") if before.startswith("# ") else ""
        rows.append(f"| `{column}` | {cell(kind)} | {'' if required else 'or null'} | {cell(meaning)} |")
    extended = re.match(r"(\w+)\.append", ast.unparse(node))
    return rows, f" All columns of `{extended[1]}`, and:" if extended else ""


def schemas_page() -> str:
    """docs/schemas.md."""
    head = (
        f"# Files and their columns\n\nMade from the schemas in the code {MADE}\n\n"
        "Paths are relative to the results folder; `{dataset}`, `{track}` and the rest are those of the header of the "
        "Snakefile. Tables are Parquet, checked against their schema when they are written and when they are read."
    )
    parts = []
    for path, module, name in TABLES:
        rows, above = schema_rows(module, name)
        table = "| column | type | | |\n|---|---|---|---|\n" + "\n".join(rows)
        parts.append(f"## {path}\n\n`{name}` in `workflow_scripts/{module}`.{above}\n\n{table}")
    return "\n\n".join([head, *parts]) + "\n"


def generated_pages() -> dict[str, str]:
    """Text of the pages, by path in the repository."""
    return {"docs/stages.md": stages_page(), "docs/schemas.md": schemas_page()}


if __name__ == "__main__":
    for path, text in generated_pages().items():
        (PACKAGE.parent / path).write_text(text, encoding="utf-8")
