"""Files that must agree with one another: generated ones, pins, overlays, links of the documentation."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from workflow_scripts.configuration.model import Configuration, Resources, load
from workflow_scripts.reference.configuration import generated_files
from workflow_scripts.reference.results import pages_with_tables
from workflow_scripts.reference.stages import generated_pages

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "models/*/*.md", "results/README.md")
    for path in ROOT.glob(pattern)
)
OVERLAYS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*.yaml"))
GENERATED = generated_files() | generated_pages() | pages_with_tables()
GENERATED_PAGES = {"configuration.md", "stages.md", "schemas.md", "reruns.md"}
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def canonical(name: str) -> str:
    """Name of a package as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """Return config.yaml as Snakemake reads it."""
    return yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[tuple[str, str], int]:
    """Return the number of hashes of each (package, version) of requirements.lock."""
    found: dict[tuple[str, str], int] = {}
    current = ("", "")
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if match := re.match(rf"({NAME})(?:\[[^]]*\])?==([^ ;\\]+)", line):
            current = (canonical(match[1]), match[2])
            found[current] = 0
        elif not line.lstrip().startswith("#"):
            assert line.startswith("    --hash=sha256:"), f"requirements.lock: unexpected line {line!r}"
            found[current] += 1
    return found


def dependencies() -> tuple[set[str], set[str]]:
    """Names of the packages that pyproject.toml asks for: to run, and to develop."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], project["dependency-groups"]["dev"]]
    run, develop = ({canonical(re.match(NAME, line)[0]) for line in group} for group in groups)  # type: ignore[index]
    return run, develop


@pytest.mark.parametrize("path", sorted(GENERATED))
def test_generated_files_are_current(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == GENERATED[path], f"{path} is stale; run `make docs`"


def test_the_page_of_promises_counts_the_tests_that_there_are(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    subprocess.run([sys.executable, "tests/reliability.py", "--output", str(page)], cwd=ROOT, check=True)
    current = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert current == page.read_text(encoding="utf-8"), "docs/reliability.md is stale; run `make docs`"


def test_config_yaml_is_the_default(defaults: dict[str, Any]) -> None:
    assert load(defaults) == Configuration()


def test_overlays_have_results_folders_of_their_own() -> None:
    overlays = [yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) for path in OVERLAYS]
    folders = [overlay["results"] for overlay in overlays]
    assert len(set(folders)) == len(folders) > 0


def test_no_root_key_of_one_letter(defaults: dict[str, Any]) -> None:
    """Snakemake refuses them after `--config`."""
    assert min(map(len, defaults)) > 1


def test_dependencies_are_pinned_with_hashes(pins: dict[tuple[str, str], int]) -> None:
    run, develop = dependencies()
    assert run | develop <= {name for name, _ in pins}
    assert [pin for pin, hashes in pins.items() if not hashes] == []


def test_both_locks_agree(pins: dict[tuple[str, str], int]) -> None:
    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    versions = {(canonical(p["name"]), p["version"]) for p in locked if "registry" in p["source"]}
    assert versions == pins.keys(), "run `make lock`"
    assert {p["source"]["registry"] for p in locked if "registry" in p["source"]} == {"https://pypi.org/simple"}


def test_conda_environment_has_the_pins_of_the_lock(pins: dict[tuple[str, str], int]) -> None:
    environment = yaml.safe_load((ROOT / "envs" / "softpref.yaml").read_text(encoding="utf-8"))
    python, pip, packages = environment["dependencies"]
    assert (python.split("=")[0], pip, list(packages)) == ("python", "pip", ["pip"])
    matches = [re.match(rf"({NAME})(?:\[[^]]*\])?==([^ ;]+)", line) for line in packages["pip"]]
    installed = {(canonical(match[1]), match[2]) for match in matches if match}
    assert len(installed) == len(packages["pip"])
    assert installed <= pins.keys(), "run `make lock`"
    run, _ = dependencies()
    assert run <= {name for name, _ in installed}


def heading_anchors(text: str) -> set[str]:
    """Anchors that a Markdown page offers."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in heading_anchors(linked.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_every_page_is_listed_once() -> None:
    """docs/index.md lists all pages; README links to it alone, and mkdocs derives its navigation from the files."""
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == [page for page in pages if page != "index.md"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((docs/[^)]+\.md)[^)]*\)", readme) == ["docs/index.md"]
    assert "nav" not in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_pages_stay_short_enough_to_be_read() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED_PAGES]
    texts = [readme, *(path.read_text(encoding="utf-8") for path in pages)]
    written = [re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL) for text in texts]
    assert len(readme.splitlines()) <= 140
    assert len(readme.split()) <= 1_300
    assert sum(len(text.split()) for text in written) <= 19_500


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{name}.md" for name in ("cluster", "method", "paper-run", "plan", "provenance", "published-data")),
    ],
)
def test_keys_that_pages_name_exist(page: str, defaults: dict[str, Any]) -> None:
    """`section.key` in backquotes is a key of the configuration; a star stands for either data set."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:{'|'.join(defaults)})\.[a-z0-9_.*]+)[`:]", text):
        sections = [defaults]
        for part in name.removesuffix(".*").split("."):
            assert all(isinstance(section, dict) for section in sections), f"{page} names {name}"
            if part == "*":
                sections = [value for section in sections for value in section.values()]
            else:
                sections = [section[part] for section in sections if part in section]
            assert sections, f"{page} names the key {name}"


def test_every_rule_asks_for_the_resources_of_the_configuration() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("rules/*.smk")))
    rules = [copy or rule for rule, copy in re.findall(r"^(?:use )?rule (\w+)(?: as (\w+) with)?:", text, re.M)]
    assert re.findall(r'\*\*resources_of\("(\w+)"\)', text) == rules and len(rules) == 19
    assert set(Resources.model_fields) - {"others"} <= set(rules)


def test_bundled_model_is_small() -> None:
    weights = list((ROOT / "models" / "tiny-qwen2.5-vl").glob("*.safetensors"))
    assert weights
    assert sum(path.stat().st_size for path in weights) <= 4_000_000


def test_mlflow_commands_bind_to_this_machine_only() -> None:
    """Wherever a command that serves MLflow's pages is written: pages, Makefile, code."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {name: (ROOT / name).read_bytes().decode(errors="ignore") for name in listed.split("\0")[:-1]}
    serving = [
        (name, line)
        for name, text in texts.items()
        for line in text.splitlines()
        if re.search(r"mlflow[\"', ]+(ui|server|gateway)\b", line) and not name.startswith("tests/")
    ]
    assert {name for name, _ in serving} >= {"Makefile", "README.md"}
    for name, line in serving:
        assert re.search(r"--host[\"', ]+127\.0\.0\.1\b", line), f"{name}: {line}"
    everywhere = ".".join("0000")
    assert [name for name, text in texts.items() if everywhere in text and not name.endswith(".lock")] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    assert phony
    assert re.findall(r"^([a-z0-9-]+):.*## .+$", makefile, flags=re.MULTILINE) == phony[1].split()
