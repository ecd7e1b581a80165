"""What a person finds on MLflow's pages: in a real browser, from a real server, of runs as the stages log them."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workflow_scripts.commands.log_runs import log_runs
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import MakeGallery, MakeTables, TrainGrpo
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.reporting.gallery import GALLERY
from workflow_scripts.running.provenance import sidecar_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium: install Debian's package"),
]
PATIENCE = 300_000  # milliseconds, on a busy machine
TRAINING = "train_grpo · imagereward · seed 0"


class Pages(NamedTuple):
    """Pages of an experiment, and the ids of its runs by stage."""

    address: str
    runs: dict[str, str]

    def at(self, path: str) -> str:
        """Address of a page under the part of MLflow's menu that has runs and traces."""
        return f"{self.address}/{path}?workflowType=machine_learning"


def write_job(output: Path, others: list[Path], stage: str, config: Any, inputs: list[Path], **record: Any) -> None:
    """Write the sidecar of a job that made these outputs."""
    for path in (output, *others):
        assert path.is_file()
    name = f"2026-01-0{1 + len(inputs)}T00:00:00.000+00:00"
    defaults: dict[str, Any] = {"metrics": {}, "warnings": [], "seconds": 1.5, "peak_memory_megabytes": 99, "log": None}
    defaults |= {"stage": stage, "stage_key": stage, "config": config.model_dump(mode="json"), "code_digest": "c"}
    defaults |= {"git_commit": "abc", "upstream_runs": [], "versions": {}, "started": name, "mlflow_run_id": None}
    defaults["inputs"] = {str(path): file_record(path)["sha256"] for path in inputs}
    defaults["outputs"] = {os.path.relpath(path, output.parent): file_record(path) for path in (output, *others)}
    write_json(sidecar_path(output), defaults | record)


def gallery_row(image: str, right: bool) -> dict[str, Any]:
    """An image that the policy has thought about."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "teal").save(file, "WEBP")
    row = {
        "prompt_id": f"prompt-{image}",
        "prompt": f"a {image} on a chair",
        "dataset": "imagereward",
        "seed": 0,
        "k": 1,
    }
    row |= {
        "track": "imagereward",
        "policy": "grpo",
        "image_id": image,
        "image": file.getvalue(),
        "width": 48,
        "height": 32,
    }
    row |= {
        "anchor": False,
        "human_rank": 1.0,
        "human_rating": 6.0,
        "predicted_rank": 2,
        "score": 4.5,
        "score_se": None,
    }
    row |= {"pairs": 2, "pairs_right": 2.0 * right, "right": right, "confidence": 0.9}
    thought = {"k": 0, "text": f"<think>the {image} sits upside down</think><answer>5</answer>", "soft": 4.5}
    thought |= {"answer_probabilities": [0, 0, 0, 0.5, 0.5, 0, 0], "sampled_answer": 5, "forced": False, "second": None}
    return row | {"rollouts": [thought]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """Results of a training, a gallery and tables, logged to a store, and a server that shows it."""
    folder = tmp_path_factory.mktemp("ui")
    c = Configuration()
    results = folder / "results"
    results.mkdir()
    adapter, record = results / "adapter_model.safetensors", results / "training.json"
    adapter.write_bytes(b"weights")
    curve = [{"step": step, "reward": step / 5, "kl": 0.1 * step, "rewards/format/mean": 1.0} for step in range(1, 6)]
    validations = [
        {"step": step, "eval_soft_pair_accuracy": 0.5 + step / 20, "eval_answer_share/7": 0.2} for step in (0, 5)
    ]
    record.write_text(json.dumps({"history": curve + validations}))
    write_job(adapter, [record], "train_grpo", TrainGrpo.of(c, "imagereward", 0), [])
    gallery = results / "gallery.parquet"
    rows = [gallery_row("cat", True), gallery_row("dog", False)]
    pq.write_table(pa.Table.from_pylist(rows, schema=GALLERY), gallery)
    write_job(gallery, [], "make_gallery", MakeGallery.of(c, "imagereward", "grpo", "imagereward", 0), [adapter])
    table, words = results / "table1.csv", results / "tables.md"
    table.write_text("training_data,mean@1\nImageReward,64.82\n")
    words.write_text("# Tables\n\n| training_data | mean@1 |\n|---|---|\n| ImageReward | 64.82 |\n")
    write_job(table, [words], "make_tables", MakeTables.of(c), [adapter, gallery])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "looked-at")
        assert log_runs([results]) == (3, 0, [])
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("looked-at")
    runs = {run.data.tags["stage"]: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        yield Pages(f"http://127.0.0.1:{port}/#/experiments/{experiment.experiment_id}", runs)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def page(pages: Pages) -> Iterator[Any]:
    """A page of a browser that has never been here, wide enough for what MLflow puts beside its own."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1900, "height": 1100})
        opened.set_default_timeout(PATIENCE)
        yield opened
        browser.close()


def go(page: Any, address: str) -> None:
    """Open a page anew: of an address that differs after # alone the browser would keep what is shown."""
    page.goto("about:blank")
    page.goto(address, wait_until="commit")


def keep(page: Any, name: str) -> None:
    """Keep a picture of the page where SOFTPREF_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SOFTPREF_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_the_list_names_the_runs_tables_first(pages: Pages, page: Any) -> None:
    from playwright.sync_api import expect

    go(page, pages.at("runs"))
    names = page.get_by_role("link", name="make_tables").or_(page.get_by_role("link", name=TRAINING, exact=True))
    expect(names).to_have_count(2)
    keep(page, "runs")
    assert names.all_inner_texts() == ["make_tables", TRAINING]
    expect(page.get_by_text("every job of the workflow is one run").first).to_be_visible()


def test_the_tables_say_what_they_are_and_lead_to_the_training(pages: Pages, page: Any) -> None:
    from playwright.sync_api import expect

    go(page, pages.at(f"runs/{pages.runs['make_tables']}"))
    expect(page.get_by_text("snakemake --cores all --force results/table1.csv").first).to_be_visible()
    expect(page.get_by_role("cell", name="64.82").first).to_be_visible()
    keep(page, "tables")
    page.get_by_text("Show more").first.click()  # MLflow folds a long description
    with page.expect_popup() as opened:  # a tab of its own
        page.get_by_role("link", name=TRAINING).first.click()
    expect(opened.value.get_by_role("heading", name=TRAINING).first).to_be_visible()
    assert pages.runs["train_grpo"] in opened.value.url
    opened.value.close()


def test_a_training_shows_its_curves(pages: Pages, page: Any) -> None:
    from playwright.sync_api import expect

    go(page, pages.at(f"runs/{pages.runs['train_grpo']}/model-metrics"))
    for group, curve in {"train": "reward", "validation": "accuracy"}.items():
        heading = page.get_by_text(re.compile(rf"^{group}\s*\(\d+\)$"))
        heading.first.scroll_into_view_if_needed()
        expect(heading.first).to_be_visible()
        shown = page.get_by_text(curve, exact=True).locator("visible=true").first
        shown.scroll_into_view_if_needed()
        expect(shown).to_be_visible()
    expect(page.locator("path.js-line").first).to_be_attached()
    keep(page, "curves")


def test_a_table_can_be_read_among_the_artifacts(pages: Pages, page: Any) -> None:
    from playwright.sync_api import expect

    go(page, pages.at(f"runs/{pages.runs['make_tables']}/artifacts/table1.csv"))
    expect(page.get_by_text("training_data").first).to_be_visible()
    expect(page.get_by_text("64.82").first).to_be_visible()
    keep(page, "artifact")


def test_a_trace_is_found_by_its_tag_and_shows_the_thinking(pages: Pages, page: Any) -> None:
    from playwright.sync_api import expect

    go(page, pages.at("traces"))
    expect(page.get_by_text("a cat on a chair").first).to_be_attached()
    page.get_by_role("button", name="Got it").click()  # what MLflow tells a first visitor hides the table
    page.get_by_role("button", name="Filters").click()
    page.get_by_role("combobox", name="Filter field").click()
    page.get_by_role("option", name="Tag", exact=True).click()
    page.get_by_role("textbox", name="Filter key").fill("right")
    page.get_by_role("textbox", name="Filter value").fill("false")
    page.get_by_role("button", name="Apply filters").click()
    expect(page.get_by_text("a cat on a chair")).to_have_count(0)
    expect(page.get_by_text("a dog on a chair").first).to_be_visible()
    keep(page, "traces")
    page.get_by_text("a dog on a chair").first.click()
    expect(page.get_by_text("the dog sits upside down").first).to_be_visible()
    expect(
        page.locator("img[src^='blob:'], img[src*='attachment'], img[src^='data:image/webp']").first
    ).to_be_attached()
    keep(page, "trace")
