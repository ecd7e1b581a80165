"""Command lines: typed arguments of stages, their files marked as read or written, and how errors are told."""

import atexit
import gc
import inspect
import sys
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from workflow_scripts.running.code_digest import PACKAGE

Input = Annotated[Path, "input"]
Output = Annotated[Path, "output"]

ABOUT_CONFIG = """The workflow passes --config and --code_digest: `snakemake -n --printshellcmds` shows the command of
every job. What the keys of --config mean, with bounds and defaults: docs/configuration.md.

Exit status: 0 done; 1 an error, said in one line where its cause is known; 2 wrong arguments; 130 interrupted."""

Settings = TypeVar("Settings", bound=BaseSettings)


class UsageError(ValueError):
    """Arguments that do not go together, or name what is not there: ends a command with status 2."""


class Command(BaseModel):
    """A command that people type; what it does is its method `cli_cmd`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init_subclass__(cls, **options: Any) -> None:
        """Show the documentation of a command in `--help` without the indentation of its source."""
        super().__init_subclass__(**options)
        cls.__doc__ = inspect.getdoc(cls)


class StageArguments(BaseSettings):
    """Arguments that every stage has; a stage adds its files, marked `Input` or `Output`, and its `config`.

    The sidecar of the stage stands beside its first output: `<output>.provenance.json`.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=False,
        cli_enforce_required=False,  # `--config JSON` brings the keys that argparse would otherwise ask for one by one
    )

    code_digest: str | None = None
    """Digest of the code this stage runs, as the workflow has computed it; null: the stage does so."""
    log_file: Path | None = None
    """Log of this job, attached to its MLflow run."""

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> Self:
        """Parse the command line; unknown options and wrong values end it with a usage message.

        An option may have several values, or none: an empty list of files of a rule leaves it out.
        """
        freeze_imports()
        sys.excepthook = tell_briefly
        module: Any = inspect.getmodule(cls)
        about, example = about_and_example(module.__doc__ or "")
        return parse(
            cls,
            one_value_each(sys.argv[1:] if arguments is None else arguments, cls.model_fields),
            prog=f"python -m {module.__spec__.name}",
            about=about,
            after=f"{example}\n\n{ABOUT_CONFIG}".strip(),
        )

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Read the command line alone: a stage must not depend on variables of the environment."""
        return (init_settings,)

    def files(self, role: str) -> dict[str, list[Path]]:
        """Files marked `input` or `output`, by argument; absent optional ones are left out."""
        found = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if role in _marks(field) and value:
                found[name] = list(value) if isinstance(value, list) else [value]
        return found


def parse(model: type[Settings], words: list[str], prog: str, about: str, after: str = "") -> Settings:
    """Make a model from the words of a command line; wrong words end the process with status 2 and a message.

    Args:
        model: its fields are the arguments, or subcommands.
        words: what stands behind the name of the program.
        prog: the name of the program.
        about: what `--help` says before the arguments.
        after: what it says after them.
    """
    # argparse would take a percent sign for a placeholder.
    source: Any = CliSettingsSource(model, cli_prog_name=prog)
    source.root_parser.description = about.replace("%", "%%")
    source.root_parser.epilog = after.replace("%", "%%")
    try:
        return CliApp.run(model, cli_args=words, cli_settings_source=source)
    except ValidationError as error:
        below = len(words) > 0 and error.errors()[0]["loc"][0] == words[0]  # in a subcommand
        problems = [f"--{'.'.join(map(str, e['loc'][below:]))}: {e['msg']}" for e in error.errors()]
    except SettingsError as error:
        problems = [f"{error}: {error.__cause__}" if error.__cause__ else str(error)]
    print("wrong arguments (--help lists them):", *problems, sep="\n  ", file=sys.stderr)
    raise SystemExit(2)


def one_value_each(words: list[str], known: Collection[str]) -> list[str]:
    """`--scores a b` as `--scores a --scores b`, and no `--adapter` where no value follows it.

    Options that are not known stay as they are, for the parser to refuse.
    """
    found: list[str] = []
    option = None
    for word in words:
        if word in ("-h", "--help") or (word.startswith("--") and "=" in word):
            found.append(word)
        elif word.startswith("--"):
            option = word if word[2:].split(".")[0] in known else None
            found += [] if option else [word]
        else:
            found += [option, word] if option else [word]
    return found


def about_and_example(documentation: str) -> tuple[str, str]:
    """The prose of a stage's module documentation, and its example command with one option on a line."""
    paragraphs = [paragraph for paragraph in documentation.strip().split("\n\n") if paragraph]
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("python -m ")]
    about = [paragraph for paragraph in paragraphs if paragraph not in examples]
    commands = [" ".join(example.split()).replace(" --", " \\\n      --") for example in examples]
    return "\n\n".join(about), "\n\n".join(["example:", *(f"  {command}" for command in commands)] if commands else [])


def tell_briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that this package defines in one line: its message names file and remedy.

    The traceback is attached to the MLflow run of the stage. An error of any other kind is printed with its traceback.
    Ctrl-C ends the process with status 130 by itself.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; run the same command again to go on", file=sys.stderr)
    elif kind.__module__.split(".")[0] in (PACKAGE, "__main__"):  # a stage runs as the main module
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def freeze_imports() -> None:
    """Freeze imported objects so that the collector skips them: searching them takes half the time of a small job.

    They are unfrozen at the end where torch is loaded: Triton would print a report of leaks if nothing were collected.
    """
    gc.freeze()
    atexit.register(_unfreeze_torch)


def _unfreeze_torch() -> None:
    if "torch" in sys.modules:
        gc.unfreeze()


def _marks(kind: object) -> list[object]:
    """Marks of a field, wherever they stand in its type: `Input`, `list[Input]`, `Input | None`."""
    own = [*getattr(kind, "metadata", ()), *getattr(kind, "__metadata__", ())]
    parts = [getattr(kind, "annotation", None), *get_args(kind)]
    return own + [mark for part in parts if part is not None for mark in _marks(part)]
