"""Digest of the code that a stage runs: what makes it rerun when code changes."""

import ast
from functools import cache
from pathlib import Path

from workflow_scripts.files.digests import digest, file_digest
from workflow_scripts.files.paths import ROOT

PACKAGE = "workflow_scripts"

# Rooms whose code counts for no rerun: what they decide is in a stage's canonical configuration, or is only recorded.
UNCOUNTED = ("configuration", "running", "tracking")


@cache
def code_digest(stage: str, engine: str | None = None) -> str:
    """Digest of the code that shapes the outputs of a stage.

    It covers the stage's module and every project module that is imported from there on, without comments, docstrings,
    formatting and import order, and the data files and templates that these modules name. Of the rollout engines only
    the selected one counts; modules in the rooms of `UNCOUNTED` do not, although what they import does.
    """
    essences = []
    for name, path in sorted(module_closure(f"{PACKAGE}.stages.{stage}", engine).items()):
        essences.append(f"# {name}\n{_read(path.read_text(encoding='utf-8'))[1]}")
        essences += [f"# {file.name}\n{file_digest(file)}" for file in named_files(path)]
    return digest("\n".join(essences))


def module_closure(module: str, engine: str | None = None) -> dict[str, Path]:
    """Project modules that shape what `module` writes: itself and all that it imports, directly or not.

    Raises:
        ValueError: there is no such module.
    """
    if _module_path(module) is None:
        raise ValueError(f"{module} is no module of this package")
    found: dict[str, Path] = {}
    waiting, seen = [module], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _module_path(name)
        room, _, short = name.removeprefix(f"{PACKAGE}.").partition(".")
        other_engine = room == "rollouts" and short.endswith("_engine") and short != f"{engine}_engine"
        if path is None or other_engine:
            continue
        if room not in UNCOUNTED:
            found[name] = path
        waiting += _read(path.read_text(encoding="utf-8"))[0]
    return found


def named_files(module: Path) -> list[Path]:
    """Files beside a module that are no code and that it names, a folder standing for all files in it."""
    text = module.read_text(encoding="utf-8").replace("'", '"')
    named = [
        path
        for path in sorted(module.parent.iterdir())
        if path.suffix != ".py" and path.name != "__pycache__" and f'"{path.name}"' in text
    ]
    return [file for path in named for file in (path, *sorted(path.rglob("*"))) if file.is_file()]


def _module_path(name: str) -> Path | None:
    if name.split(".")[0] != PACKAGE:
        return None
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


@cache  # most modules are in the closure of several stages
def _read(module: str) -> tuple[list[str], str]:
    """Of a module's text: the names that it imports, wherever it does so, and what the digest covers."""
    tree = ast.parse(module)
    imported: list[str] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A bare string is prose wherever it stands: docstring of a module, a function, a class or an attribute.
            node.body = [
                n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.Import):
                imported += names
            elif node.module:
                imported += [node.module, *(f"{node.module}.{name}" for name in names)]
            node.names.sort(key=lambda alias: alias.name)
        # No expression holds a statement, and most of a tree is expressions: every dry run would walk them.
        waiting += (
            n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler | ast.match_case)
        )
    imports = sorted(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    rest = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return imported, "\n".join(imports + rest)
