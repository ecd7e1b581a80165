"""The report as one HTML file: its template, style and script, and how they are put together.

All text that a template is given is escaped: prompts and completions are anyone's. The page may load nothing and run no
script but its own, which its content security policy says to the browser.
"""

import base64
import hashlib
from typing import Any

import jinja2
from markupsafe import Markup

STYLE = """
:root { --paper: #ffffff; --card: #f5f6f8; --ink: #1f2329; --muted: #57606a; --line: #c9ced6; --link: #0b5cad;
  --good: #0a6640; --bad: #a83200; --mark: #fff3d6; --blue: #0072b2; --vermilion: #d55e00; --green: #009e73;
  --purple: #cc79a7; color-scheme: light; }
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) { --paper: #14161a; --card: #1d2026;
  --ink: #e6e8eb; --muted: #a9b0ba; --line: #434955; --link: #8cc0ff; --good: #63d6a8; --bad: #ffa278; --mark: #3b3013;
  --blue: #56b4e9; --vermilion: #ff8a3d; --green: #35c79b; --purple: #e0a0c4; color-scheme: dark; } }
:root[data-theme="dark"] { --paper: #14161a; --card: #1d2026; --ink: #e6e8eb; --muted: #a9b0ba; --line: #434955;
  --link: #8cc0ff; --good: #63d6a8; --bad: #ffa278; --mark: #3b3013; --blue: #56b4e9; --vermilion: #ff8a3d;
  --green: #35c79b; --purple: #e0a0c4; color-scheme: dark; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
main p, main li, figcaption { max-width: 46rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .4rem .8rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.muted { color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); }
.note { background: var(--mark); border-left: 4px solid var(--vermilion); padding: .6rem .9rem; margin: 1rem 0; }
.top { display: flex; gap: .4rem 1rem; align-items: baseline; flex-wrap: wrap; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .6rem 0 0; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--muted);
  border-radius: 6px; padding: .3rem .6rem; max-width: 100%; }
button { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 11rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.wide { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 14rem; }
figure { margin: 1.2rem 0; }
figure.plot .scroll > svg { display: block; width: 100%; min-width: 34rem; height: auto; max-height: 56rem; }
figcaption { color: var(--muted); font-size: .92rem; }
figcaption strong { color: var(--ink); }
summary { cursor: pointer; color: var(--link); }
.filters { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; border: 1px solid var(--line);
  border-radius: 8px; padding: .6rem 1rem .8rem; margin: 1rem 0; }
.filters label { display: grid; font-size: .85rem; color: var(--muted); }
.filters select { color: var(--ink); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem 1rem;
  margin: 1rem 0; content-visibility: auto; contain-intrinsic-size: auto 34rem; }
.card h3 { margin: 0 0 .2rem; overflow-wrap: anywhere; }
.card h4 { font-size: .9rem; margin: .9rem 0 .3rem; }
.tags { display: flex; flex-wrap: wrap; gap: .2rem .8rem; font-size: .88rem; margin: 0; color: var(--muted); }
.images { list-style: none; padding: 0; margin: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); }
.images > li { min-width: 0; }
.images img { width: 100%; height: auto; max-height: 12rem; object-fit: contain; border-radius: 6px; display: block;
  background: var(--paper); }
.images p { margin: .2rem 0; font-size: .85rem; line-height: 1.35; }
.people { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .5rem; }
.people li { width: 4.2rem; font-size: .8rem; text-align: center; }
.people img { width: 4.2rem; height: 4.2rem; object-fit: contain; border-radius: 4px; display: block; }
.bars { list-style: none; display: flex; gap: 2px; padding: 0; margin: .3rem 0; font-size: .72rem; text-align: center; }
.bars li { flex: 1; display: flex; flex-direction: column; justify-content: flex-end; min-width: 0; }
.bars .bar { height: 2.6rem; display: flex; align-items: flex-end; border-bottom: 1px solid var(--muted); }
.bars .bar::before { content: ""; width: 100%; height: calc(var(--p) * 1%); background: var(--blue); }
.thought { overflow-wrap: anywhere; white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .5rem; }
details.thoughts { font-size: .85rem; }
code { overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-bottom: 3rem; color: var(--muted); font-size: .9rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .45rem; } .images { grid-template-columns: 1fr 1fr; } }
@media print { .filters, nav, button { display: none; } .card { break-inside: avoid; } }
"""

SCRIPT = """
const root = document.documentElement, toggle = document.getElementById('theme');
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
const dark = () => (root.dataset.theme ? root.dataset.theme === 'dark' : prefersDark.matches);
const label = () => { toggle.textContent = dark() ? 'Light colours' : 'Dark colours'; };
try { root.dataset.theme = localStorage.getItem('theme') || ''; } catch (error) { root.dataset.theme = ''; }
toggle.hidden = false;
toggle.addEventListener('click', () => {
  root.dataset.theme = dark() ? 'light' : 'dark';
  try { localStorage.setItem('theme', root.dataset.theme); } catch (error) { /* not remembered, then */ }
  label();
});
prefersDark.addEventListener('change', label);
label();

// Every picture is in the file once, however many policies have judged it.
const pictures = JSON.parse(document.getElementById('pictures').textContent);
for (const image of document.querySelectorAll('img[data-picture]')) image.src = pictures[image.dataset.picture];

const form = document.getElementById('filters'), count = document.getElementById('count');
const cards = [...document.querySelectorAll('.card')];
const filter = () => {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  let shown = 0;
  for (const card of cards) {
    card.hidden = !wanted.every(([name, value]) => card.dataset[name] === value);
    shown += !card.hidden;
  }
  count.textContent = `${shown} of ${cards.length} shown`;
};
if (form) {
  form.addEventListener('change', filter);
  form.addEventListener('reset', () => setTimeout(filter));
  form.addEventListener('submit', (event) => event.preventDefault());
  // A link to a card that is filtered out shows everything again.
  addEventListener('hashchange', () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.hidden) { form.reset(); setTimeout(() => target.scrollIntoView()); }
  });
  filter();
}
"""

TEMPLATE = """
{%- macro table(t) -%}
<div class="scroll" tabindex="0" role="region" aria-label="{{ t.caption }}"><table>
<caption>{{ t.caption }}</caption>
<thead><tr>{% for column in t.columns %}<th scope="col"{% if loop.index0 >= t.heads %} class="number"{% endif %}>
{{- column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows %}<tr>{% for cell in row %}
{%- if loop.index0 == 0 %}<th scope="row">{{ cell }}</th>
{%- elif loop.index0 < t.heads %}<td>{{ cell }}</td>
{%- else %}<td class="number">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endmacro -%}
{%- macro plot(f) -%}
<figure class="plot" id="figure-{{ f.name }}">
<div class="scroll" tabindex="0" role="img" aria-label="{{ f.alt }}">{{ f.svg }}</div>
<figcaption><strong>{{ f.title }}.</strong> {{ f.caption }}
<a download="{{ f.name }}.csv" href="data:text/csv;base64,{{ f.csv }}">Data as CSV
<span class="hidden">of {{ f.title }}</span></a></figcaption>
</figure>
{%- endmacro -%}
{%- macro plots(names) -%}
{% for f in figures if f.name in names %}{{ plot(f) }}{% endfor %}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'sha256-{{ script_hash }}'; base-uri 'none'; form-action 'none'">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<a class="skip" href="#tables">Skip to the tables</a>
<header>
<div class="top"><h1>{{ title }}</h1><button id="theme" type="button" hidden>Dark colours</button></div>
<p>{{ lead }}</p>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
<nav aria-label="Sections"><ul>
<li><a href="#tables">Tables</a></li><li><a href="#training">Training</a></li>
<li><a href="#rollouts">More rollouts</a></li><li><a href="#calibration">Calibration</a></li>
<li><a href="#sensitivity">Sensitivity</a></li><li><a href="#fails">Where it fails</a></li>
<li><a href="#gallery">Gallery</a></li><li><a href="#settings">Data and settings</a></li>
<li><a href="#provenance">Provenance</a></li>
</ul></nav>
</header>
<main>
<h2 id="tables">Tables</h2>
<p>{{ reading }}</p>
{% for t in tables %}<h3>{{ t.title }}</h3>{{ table(t) }}{% endfor %}
<p class="muted">Protocols: {% for line in protocols %}{{ line }}{{ "; " if not loop.last }}{% endfor %}.</p>
<h3>What the paper claims</h3>
<p>{{ claims.lead }}</p>
{{ table(claims) }}

<h2 id="training">Training</h2>
{{ plots(["training_curves", "answers"]) }}

<h2 id="rollouts">More rollouts of one item</h2>
{{ plots(["mean_at_k"]) }}

<h2 id="calibration">Calibration of the soft reward</h2>
{{ plots(["calibration_pairs"]) }}
{{ table(calibration) }}
{{ plots(["calibration_ratings"]) }}

<h2 id="sensitivity">Sensitivity to choices of the protocol</h2>
{{ plots(["tie_rules", "presentation_order", "anchor_rank"]) }}

<h2 id="fails">Where it fails</h2>
<p>{{ failing }}</p>
{{ plots(["rank_distance", "confidence"]) }}
{% if mistakes %}<h3>Most confident mistakes of the gallery</h3>
<ul>{% for card in mistakes %}<li><a href="#{{ card.id }}">{{ card.prompt }}</a>
<span class="muted">{{ card.policy_name }}, {{ card.test_name }}: {{ card.agreement }}</span></li>
{% endfor %}</ul>{% endif %}
<h3>Warnings of the jobs</h3>
{% if warnings %}<ul>{% for job, text in warnings %}<li><strong>{{ job }}</strong>: {{ text }}</li>{% endfor %}</ul>
{% else %}<p>None.</p>{% endif %}

<h2 id="gallery">Gallery</h2>
<p>The first test prompts in hash order, none chosen by hand. Images stand in the order of their soft score, mean of the
recorded rollouts, the best first; below them in the order of people.
✓ and ✗ say whether the score orders more than half of the image's pairs as people do. Confidence is how far
the answers' probabilities are from all being alike; its thirds are those of each training set's policies.</p>
<noscript><p class="note">Pictures and filters need JavaScript; all of it is in this file.</p></noscript>
<form class="filters" id="filters" aria-label="Filter the gallery">
{% for f in filters %}<label>{{ f.title }}<select name="{{ f.name }}"><option value="">all</option>
{%- for value, name in f.choices %}<option value="{{ value }}">{{ name }}</option>{% endfor %}</select></label>
{% endfor %}<button type="reset">Show all</button>
<output id="count" role="status"></output>
</form>
{% for card in cards %}
<article class="card" id="{{ card.id }}" data-outcome="{{ card.outcome }}" data-confidence="{{ card.level }}"
 data-test="{{ card.test }}" data-policy="{{ card.policy }}" data-track="{{ card.track }}" data-seed="{{ card.seed }}">
<h3>{{ card.prompt }}</h3>
<p class="tags"><span>{{ card.policy_name }}</span><span>{{ card.test_name }}</span>
<span class="{{ "bad" if card.outcome == "wrong" else "good" }}">{{ card.agreement }}</span>
<span>confidence {{ "%.2f"|format(card.confidence) }} ({{ card.level }})</span></p>
<h4>By the policy, mean of {{ card.k }} rollout{{ "s" if card.k != 1 }}</h4>
<ol class="images">{% for image in card.images %}
<li><img data-picture="{{ image.picture }}" alt="{{ image.alt }}" width="{{ image.width }}" height="{{ image.height }}">
<p>{% if image.right is not none %}<span class="{{ "good" if image.right else "bad" }}" aria-hidden="true">
{{- "✓" if image.right else "✗" }}</span>
<span class="hidden">{{ "right" if image.right else "wrong" }}</span>{% endif %}
<strong>{{ image.predicted }}</strong>, people {{ image.human }}</p>
<p>score {{ image.score }}</p>
{% if image.bars %}<ol class="bars" aria-label="Answers, mean of the rollouts">{% for name, share in image.bars %}
<li><span class="bar" style="--p: {{ "%.1f"|format(share) }}"></span><span>{{ name }}</span>
<span class="hidden">{{ "%.0f"|format(share) }} %</span></li>{% endfor %}</ol>
<details class="thoughts"><summary>Reasoning<span class="hidden"> about image {{ loop.index }}</span></summary>
{% for r in image.rollouts %}<p class="thought">{{ r.thinking }}</p>
<p class="muted">{{ r.said }}</p>{% endfor %}</details>
{% else %}<p class="muted">Anchor: the others were compared with it.</p>{% endif %}</li>{% endfor %}</ol>
{% if card.people %}<h4>By people</h4>
<ol class="people">{% for image in card.people %}
<li><img data-picture="{{ image.picture }}" alt="{{ image.people_alt }}"
 width="{{ image.width }}" height="{{ image.height }}">{{ image.human }}</li>{% endfor %}</ol>{% endif %}
</article>
{% else %}<p>No gallery.</p>{% endfor %}

<h2 id="settings">Data and settings</h2>
<p>{{ data }}</p>
{% for stage in stages %}<details><summary>{{ stage.name }}: {{ stage.jobs }} job{{ "s" if stage.jobs != 1 }}</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Settings of {{ stage.name }}"><table>
<thead><tr><th scope="col">key</th><th scope="col">value</th></tr></thead>
<tbody>{% for key, value in stage.settings %}<tr><th scope="row">{{ key }}</th><td class="wide">{{ value }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endfor %}

<h2 id="provenance">Provenance</h2>
<p>{{ provenance.lead }}</p>
{{ table(provenance) }}
<p>Versions: {{ versions }}.</p>
</main>
<footer><p>Method: Gambashidze, Sobolev, Kuznetsov, Oseledets, <cite>Test-Time Reasoning Through Visual
Human Preferences with VLMs and Soft Rewards</cite>, arXiv 2503.19948. This file needs nothing
else and loads nothing.</p></footer>
<script type="application/json" id="pictures">{{ pictures|tojson }}</script>
<script>{{ script }}</script>
</body>
</html>
"""


def render(content: dict[str, Any]) -> str:
    """The page with this content; every text is escaped, `svg` of a figure must be safe already.

    Raises:
        jinja2.UndefinedError: the template asks for what is not in `content`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return environment.from_string(TEMPLATE).render(
        content,
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(digest).decode(),
    )
