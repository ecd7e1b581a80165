"""Command lines of the stages: typed arguments, files marked as read or written."""

import atexit
import gc
import inspect
import sys
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, get_args

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict, SettingsError

from workflow_scripts.running.code_digest import PACKAGE

Input = Annotated[Path, "input"]
Output = Annotated[Path, "output"]

ABOUT_CONFIG = """The workflow passes --config and --code_digest: `snakemake -n --printshellcmds` shows the command of
every job. What the keys of --config mean, with bounds and defaults: docs/configuration.md.

Exit status: 0 done; 1 an error, said in one line where its cause is known; 2 wrong arguments; 130 interrupted."""


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
        """Parse the command line; unknown options and wrong values end it with a usage message."""
        freeze_imports()
        sys.excepthook = tell_briefly
        about, example = described(inspect.getmodule(cls).__doc__ or "")
        # argparse would take a percent sign for a placeholder.
        source: Any = CliSettingsSource(cls, cli_prog_name=f"python -m workflow_scripts.stages.{_stage(cls)}")
        source.root_parser.description = about.replace("%", "%%")
        source.root_parser.epilog = f"{example}\n\n{ABOUT_CONFIG}".strip().replace("%", "%%")
        try:
            return CliApp.run(
                cls, cli_args=sys.argv[1:] if arguments is None else arguments, cli_settings_source=source
            )
        except ValidationError as error:
            problems = [f"--{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        except SettingsError as error:
            problems = [f"{error}: {error.__cause__}"]
        print("wrong arguments (--help says what there is):", *problems, sep="\n  ", file=sys.stderr)
        raise SystemExit(2)

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Only the command line: a stage must not depend on variables of the environment."""
        return (init_settings,)

    def files(self, role: str) -> dict[str, list[Path]]:
        """Files marked `input` or `output`, by argument; absent optional ones are left out."""
        found = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if role in _marks(field) and value:
                found[name] = list(value) if isinstance(value, list) else [value]
        return found


def described(documentation: str) -> tuple[str, str]:
    """What a stage is for, and its example command with one option on a line, from its module's documentation."""
    paragraphs = [paragraph for paragraph in documentation.strip().split("\n\n") if paragraph]
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("python -m ")]
    about = [paragraph for paragraph in paragraphs if paragraph not in examples]
    commands = [" ".join(example.split()).replace(" --", " \\\n      --") for example in examples]
    return "\n\n".join(about), "\n\n".join(["example:", *(f"  {command}" for command in commands)] if commands else [])


def tell_briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say an error of the project's own kinds in one line: its message names file and remedy, the traceback hides it.

    The traceback is attached to the stage's MLflow run; an error of any other kind is printed with it here. Ctrl-C ends
    the process with status 130 by itself.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; run the same command again to go on", file=sys.stderr)
    elif kind.__module__.split(".")[0] in (PACKAGE, "__main__"):  # a stage's own kinds are the main module's
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def freeze_imports() -> None:
    """Leave what is imported to no garbage collection: searching it, the last time at the end, is half of a small job.

    Not with torch: Triton, which comes with it, prints a report of leaks if nothing is collected at the end.
    """
    gc.freeze()
    atexit.register(_unfreeze_torch)


def _unfreeze_torch() -> None:
    if "torch" in sys.modules:
        gc.unfreeze()


def _stage(arguments: type[StageArguments]) -> str:
    return Path(inspect.getfile(arguments)).stem


def _marks(kind: object) -> list[object]:
    """Marks of a field, wherever they stand in its type: `Input`, `list[Input]`, `Input | None`."""
    own = [*getattr(kind, "metadata", ()), *getattr(kind, "__metadata__", ())]
    parts = [getattr(kind, "annotation", None), *get_args(kind)]
    return own + [mark for part in parts if part is not None for mark in _marks(part)]
