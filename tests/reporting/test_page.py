"""The report as a reader meets it: in a real browser, offline; and what hostile text can do in it."""

import io
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import MakeReport
from workflow_scripts.configuration.targets import FIGURES as CONFIGURED
from workflow_scripts.reporting import cards, drawing
from workflow_scripts.reporting.figures import FIGURES
from workflow_scripts.reporting.gallery import GALLERY
from workflow_scripts.reporting.page import CAPTIONS, content, render

ATTACK = '<script>document.title = "taken"</script><img src="https://example.org/x" onerror="document.title=1">"\'&'
CHROMIUM = shutil.which("chromium")


def picture(colour: str) -> bytes:
    """A WebP file."""
    file = io.BytesIO()
    Image.new("RGB", (120, 80), colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def gallery_rows(track: str, policy: str, rights: list[float]) -> list[dict[str, Any]]:
    """A gallery with a prompt of two images for each number of pairs that are right, of one."""
    rows = []
    for number, right in enumerate(rights):
        for i, colour in enumerate(("red", "blue")):
            anchor = track == "hpsv2" and i == 1
            rollout = {"k": 0, "text": f"<think>{ATTACK} seen</think><answer>1</answer>", "soft": 0.7, "forced": False}
            answers = [0.3, 0.7] if track == "hpsv2" else [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4]
            rollout |= {"answer_probabilities": answers, "sampled_answer": 1}
            rollout["second"] = True if track == "hpsv2" else None
            rows.append(
                {"prompt_id": f"p{number}", "prompt": f"{ATTACK} {number}", "dataset": track, "track": track}
                | {"policy": policy, "seed": 0, "k": 1, "image_id": f"{number}-{i}", "image": picture(colour)}
                | {"width": 120, "height": 80, "anchor": anchor, "human_rank": 1.0 + i, "human_rating": None}
                | {"predicted_rank": 1 + i, "score": 0.7 - i / 5, "score_se": None, "pairs": 1, "pairs_right": right}
                | {"right": right > 0.5, "confidence": number / 10, "rollouts": [] if anchor else [rollout]}
                | {"distribution": None if anchor else answers}
            )
    return rows


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the page is made of, from tables, figures and galleries of two policies and two test sets."""
    folder = tmp_path_factory.mktemp("results")
    head = {"training_data": "ImageReward", "test_data": "ImageReward", "against": "labels", "seed": 0}
    means = {f"mean@{k}{end}": 60.0 + k for k in (1, 3) for end in ("", "_se", "_low", "_high")}
    end = {"ceiling": 74.0, "n_pairs": 9, "n_prompts": 3, "protocol": "micro", "model": ATTACK, "rollouts": 3}
    end |= {"data_source": "synthetic", "forced_percent": 0.0, "missing_answer_percent": 0.0}
    seen = {"items_available": 4123, "items_seen": 3200, "epochs": 0.776}
    one = head | means | seen | {"mean@1_paper": 64.7, "mean@3_paper": 64.9} | end
    pd.DataFrame([one]).to_csv(folder / "table1.csv")
    two = [{"method": "Single human", "against": "labels", "mean@1": 64.8, "paper": 65.1}]
    two += [{"method": "Zero-shot reasoning", "against": "labels", "seed": 0, "paper": 51.0} | means | end]
    pd.DataFrame(two).to_csv(folder / "table2.csv")
    difference = {"difference": 2.0, "difference_low": -1.0, "difference_high": 5.0, "holds": False}
    claim = {"claim": "trained > zero-shot", "test_data": "imagereward", "against": "labels", "tie": "half", "seed": 0}
    pd.DataFrame([claim | difference]).to_csv(folder / "comparisons.csv")
    case = {"case": ATTACK, "track": "imagereward", "test": "imagereward", "mean": 0.6, "low": 0.5, "high": 0.7}
    both = [case | {"policy": p, "method": m} for p in ("zeroshot", "grpo") for m in ("soft", "hard")]
    made = {
        "mean_at_k": [row | {"k": k, "tokens": 20 * k} for row in both for k in (1, 2, 3)],
        "calibration_pairs": [
            case | {"policy": p, "rollouts": n, "bin_low": b / 10, "bin_high": (b + 1) / 10, "predicted": b / 10}
            | {"count": b, "brier": 0.2, "ece": 0.1}
            for p in ("zeroshot", "grpo") for n in (1, 3) for b in (3, 7)
        ],
    }  # fmt: skip
    (folder / "figures").mkdir()
    for name, plot in FIGURES.items():
        table = pd.DataFrame(made.get(name, []), columns=plot.columns)
        table.to_csv(folder / "figures" / f"{name}.csv", index=False)
        figure = drawing.nothing("none") if table.empty else plot.draw(table)
        drawing.save(figure, folder / "figures" / f"{name}.svg", "svg")
    galleries = {"a": ("imagereward", "zeroshot", [0.0, 1.0, 1.0]), "b": ("hpsv2", "grpo", [1.0, 0.0, 0.5])}
    for name, rows in galleries.items():
        pq.write_table(pa.Table.from_pylist(gallery_rows(*rows), GALLERY), folder / name)
    sidecar: dict[str, Any] = {"stage": "train_grpo", "stage_key": "k", "config": {"track": "hpsv2", "seed": 0}}
    sidecar |= {"warnings": [ATTACK], "seconds": 60.0, "peak_memory_megabytes": 9, "code_digest": "c", "inputs": {}}
    sidecar |= {"git_commit": "abc", "started": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2"}}
    sidecar |= {"processor": {"vendor": "AuthenticAMD", "name": "zen3", "instructions": "avx2"}}
    paths = [folder / name for name in galleries]
    return content(paths, folder, folder / "figures", MakeReport.of(Configuration()), {"adapter": sidecar})[0]


@pytest.fixture(scope="module")
def page(filled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(filled), encoding="utf-8")
    return path


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_names_versions_and_processors(filled: dict[str, Any]) -> None:
    assert filled["versions"] == "torch 2" and filled["processors"] == "zen3 (AuthenticAMD), avx2"


def test_table1_says_what_was_trained_on(filled: dict[str, Any]) -> None:
    one, two = filled["tables"]
    row = dict(zip(one["columns"], one["rows"][0], strict=True))
    assert (row["items available"], row["items seen"], row["epochs"]) == ("4123", "3200", "0.78")
    assert "epochs count every item drawn" in one["caption"]
    assert "epochs" not in two["columns"] and "epochs" not in two["caption"]


def test_hostile_text_is_text(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    assert [a.get("type") for tag, a in elements.found if tag == "script"] == ["application/json", None]
    assert not [a for _, a in elements.found if any(name.startswith("on") for name in a)]
    # In prompts, thoughts, a model's name, a warning: where it can be read, it reads as it was written.
    assert elements.text.count(ATTACK) >= 6 + 3 + 3 + 1 + 1


def test_everything_is_in_the_file(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in elements.found if (a.get("href") or "").startswith("#")} <= set(ids)  # type: ignore[index]


def test_every_picture_and_figure_says_what_it_shows(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    images = [a["alt"] for tag, a in elements if tag == "img"]
    assert len(images) == 2 * 2 * 6 and all(alt and "rank" in alt and ATTACK in alt for alt in images)
    plots = [a["aria-label"] for tag, a in elements if a.get("role") == "img"]
    assert len(plots) == 2 and all(label and "from 60 to 60 %" in label for label in plots)


def test_a_picture_is_in_the_file_once(filled: dict[str, Any], page: Path) -> None:
    assert len(filled["pictures"]) == 2
    assert page.read_text(encoding="utf-8").count("data:image/webp;base64,") == 2


def test_what_does_not_fit_is_left_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zeroshot", "grpo"):
        rows = gallery_rows("imagereward", name, [1.0] * 5)
        pq.write_table(pa.Table.from_pylist(rows, GALLERY), tmp_path / name)
    names = {"track": {"imagereward": "A"}, "test": {"imagereward": "A"}}
    monkeypatch.setattr(cards, "LARGEST_GALLERY", 14_000)
    gallery = cards.Gallery([tmp_path / "zeroshot", tmp_path / "grpo"], names)
    kept = [card["policy"] for card in gallery.cards]
    assert 0 < len(kept) < 10 and gallery.left_out == 10 - len(kept)
    assert abs(kept.count("zeroshot") - kept.count("grpo")) <= 1


def test_figures_are_named_once() -> None:
    assert tuple(FIGURES) == CONFIGURED and all((CAPTIONS / f"{name}.rst").is_file() for name in FIGURES)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_drawing_has_the_same_bytes_each_time(kind: str, tmp_path: Path) -> None:
    case = {"case": "a $ b", "policy": "grpo", "method": "soft", "mean": 0.5, "low": 0.4, "high": 0.6}
    table = pd.DataFrame([case | {"distance": d} for d in (1.0, 2.0)])
    for name in ("one", "two"):
        drawing.save(drawing.rank_distance(table), tmp_path / name, kind)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield Debian's Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH; Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, page: Path, **options: Any) -> tuple[Any, list[str]]:
    """Open the page without a network; also everything that went wrong or was asked for."""
    context = browser.new_context(offline=True, **options)
    tab = context.new_page()
    tab.set_default_timeout(120_000)
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    local = ("file:", "data:")
    tab.on("request", lambda request: None if request.url.startswith(local) else trouble.append(request.url))
    tab.goto(page.as_uri())
    return tab, trouble


def test_it_opens_offline_with_all_pictures_and_no_complaint(browser: Any, page: Path) -> None:
    tab, trouble = opened(browser, page)
    assert tab.title() == "Visual human preferences with reasoning and soft rewards"
    tab.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth === 120)")
    assert tab.evaluate("document.images.length") == 24
    assert trouble == []


def test_filters_work_by_keyboard(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page)

    def shown() -> int:
        return int(tab.evaluate("document.querySelectorAll('.card:not([hidden])').length"))

    assert shown() == 6 and tab.inner_text("#count") == "6 of 6 shown"
    for _ in range(60):  # the first filter is reached with the tabulator alone
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.name") == "outcome":
            break
    tab.keyboard.type("half")
    assert tab.evaluate("document.activeElement.value") == "wrong"
    assert shown() == 3 and tab.inner_text("#count") == "3 of 6 shown"
    for _ in range(3):
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.name") == "policy"
    tab.keyboard.type("train")
    assert shown() == 2
    while tab.evaluate("document.activeElement.type") != "reset":
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.getElementById('count').textContent === '6 of 6 shown'")
    tab.select_option("select[name=test]", "hpsv2")
    assert shown() == 3
    tab.select_option("select[name=confidence]", "high")
    assert shown() == 1


def test_a_phone_scrolls_in_one_direction_only(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page, viewport={"width": 360, "height": 700})
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


CONTRASTS = """() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => c.slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  document.querySelectorAll('details').forEach((d) => { d.open = true; });
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const own = node.parentElement;
    if (!node.textContent.trim() || own.closest('script, noscript, style, svg, option') || own.hidden) continue;
    let behind = own;
    while (behind && parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(own).color, getComputedStyle(behind).backgroundColor].map((c) => light(parse(c)));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.trim().slice(0, 40)]);
  }
  const ink = getComputedStyle(document.querySelector('svg')).color;
  const paper = getComputedStyle(document.body).backgroundColor;
  return [found, light(parse(paper)), light(parse(ink))];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Any, page: Path, scheme: str) -> None:
    tab, _ = opened(browser, page, color_scheme=scheme)
    for mode in (scheme, {"light": "dark", "dark": "light"}[scheme]):
        found, paper, ink = tab.evaluate(CONTRASTS)
        assert len(found) > 100
        assert min(found)[0] >= 4.5, min(found)
        assert (paper < 0.05 < 0.5 < ink) if mode == "dark" else (ink < 0.05 < 0.5 < paper)
        tab.click("#theme")  # and the other way by the button


def test_drawings_take_the_page_s_colours(filled: dict[str, Any]) -> None:
    for figure in filled["figures"]:
        assert "currentColor" in figure["svg"] and "var(--vermilion)" in figure["svg"]
        colours = set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]{6})", figure["svg"]))
        assert colours == set(), colours
