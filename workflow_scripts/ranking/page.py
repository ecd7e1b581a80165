"""One HTML file with ranked images in their order, scores and reasoning; it needs no other file and no network."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from workflow_scripts.preferences.images import decoded
from workflow_scripts.ranking.judge import Judge

PAGE_IMAGES = 1000  # about 8 MB of thumbnails; the other two files have every image
THUMBNAIL = (256, 256)

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ranked images</title>
<style>
:root { color-scheme: light dark; --back: #fff; --card: #f4f5f7; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de;
        --bar: #0b6aa2; --rail: #dfe4ea; --warn: #8a3b00; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1e2227; --text: #e8eaed; --quiet: #a9b1ba; --line: #3b424a; --bar: #58b0e3;
          --rail: #343b43; --warn: #ffb27a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
       font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p.about { color: var(--quiet); margin: 0; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
     grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
li.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
li.card img { display: block; width: 100%; height: 12rem; object-fit: contain; image-rendering: auto; }
.rank { font-size: 1.25rem; font-weight: 650; margin: .5rem 0 0; }
.rank span { font-weight: 400; font-size: 1rem; color: var(--quiet); }
.path { margin: 0; font-size: .85rem; color: var(--quiet); } .problem { color: var(--warn); }
dl { display: grid; grid-template-columns: auto 1fr auto; gap: .15rem .5rem; margin: .5rem 0; font-size: .85rem;
     align-items: center; }
dt { font-variant-numeric: tabular-nums; } dd { margin: 0; font-variant-numeric: tabular-nums; }
.rail { background: var(--rail); height: .6rem; border-radius: .3rem; overflow: hidden; }
.rail div { background: var(--bar); height: 100%; }
summary { cursor: pointer; } summary:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
blockquote { margin: .5rem 0; padding-left: .6rem; border-left: 3px solid var(--line); font-size: .9rem;
             white-space: pre-wrap; }
blockquote footer { color: var(--quiet); font-size: .8rem; }
</style>
</head>
<body>
<header>
<h1>Ranked images</h1>
<p class="about">{{ images }} image{{ "s" if images != 1 }}, the best of each prompt first.
{% if pairwise %}Score: probability that the image is preferred over the anchor, one of the images of its prompt, whose
score is 0.5{{ "; every pair was shown in both orders" if both_orders }}.
{% else %}Score: expected rating from 1 to 7.{% endif %}
Mean of {{ k }} rollout{{ "s" if k != 1 }}, seed {{ seed }}; ± is the standard error over them.</p>
</header>
<main>
"""

SECTION = """{% if not first %}</ol></section>
{% endif %}<section>
<h2>{{ prompt }}</h2>
<ol>
"""

CARD = """<li class="card">
{% if thumbnail %}<img alt="{{ row.path }}{% if row.rank %}, rank {{ row.rank }}{% endif %}" loading="lazy" \
src="{{ thumbnail }}">{% endif %}
{% if row.problem %}<p class="rank">not ranked</p>
<p class="path">{{ row.path }}</p>
<p class="problem">{{ row.problem }}</p>
{% else %}<p class="rank">{{ row.rank }}. &nbsp;{{ "%.3f" | format(row.score) }}
{% if row.standard_error is not none %}<span>± {{ "%.3f" | format(row.standard_error) }}</span>{% endif %}</p>
<p class="path">{{ row.path }}</p>
{% if row.distribution %}<dl>
{% for answer, share in row.distribution.items() %}<dt>{{ names.get(answer, answer) }}</dt>\
<dd class="rail" aria-hidden="true"><div style="width:{{ "%.1f" | format(100 * share) }}%"></div></dd>\
<dd>{{ "%.0f" | format(100 * share) }} %</dd>
{% endfor %}</dl>
<details><summary>Reasoning of {{ row.thoughts | length }} rollout{{ "s" if row.thoughts | length != 1 }}</summary>
{% for thought in row.thoughts %}<blockquote>{{ thought.reasoning }}
<footer>score {{ "%.3f" | format(thought.score) }}, answered {{ "nothing valid" if thought.answer is none \
else thought.answer }}{% if thought.shown %}, shown {{ thought.shown }}{% endif %}\
{{ ", thinking cut at its budget" if thought.forced }}</footer></blockquote>
{% endfor %}</details>
{% else %}<p class="path">The anchor: the other images of this prompt were compared with it.</p>
{% endif %}{% endif %}</li>
"""

FOOT = """{% if any %}</ol></section>
{% endif %}{% if left_out %}<p>{{ left_out }} more images are in the CSV and JSON lines files beside this page.</p>
{% endif %}</main>
</body>
</html>
"""


def write_page(path: Path, rows: Iterable[tuple[dict[str, Any], Path]], judge: Judge, images: int) -> None:
    """Write the page, row by row.

    Args:
        path: the HTML file.
        rows: for each image a row as in the JSON lines file and the image's path; those of a prompt together.
        judge: who has judged.
        images: their number.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    head, section, card, foot = (environment.from_string(text) for text in (HEAD, SECTION, CARD, FOOT))
    pairwise = judge.protocol == "pairwise"
    names = {"0": "anchor", "1": "this image"} if pairwise else {}
    with path.open("w", encoding="utf-8") as file:
        file.write(
            head.render(images=images, pairwise=pairwise, both_orders=judge.both_orders, k=judge.k, seed=judge.seed)
        )
        prompt, left_out = None, 0
        for number, (row, image) in enumerate(rows):
            if number >= PAGE_IMAGES:
                left_out += 1
                continue
            if row["prompt"] != prompt:
                file.write(section.render(first=prompt is None, prompt=row["prompt"]))
                prompt = row["prompt"]
            shown = thumbnail(decoded(image.read_bytes())) if row["image"] else None
            file.write(card.render(row=row, thumbnail=shown, names=names))
        file.write(foot.render(any=prompt is not None, left_out=left_out))


def thumbnail(image: Image.Image) -> str:
    """A small copy of an image as an address that holds all of it."""
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
