"""The page's HTML, style and script, for Jinja2."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1c2330; --dim: #5d6778; --paper: #f6f7f9; --card: #ffffff; --line: #dfe3e9;
  --accent: #0b63b0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --dim: #9aa5b4; --paper: #12161c; --card: #1b212a; --line: #323b48; --accent: #6db3f2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1300px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
p { margin: .2rem 0 .9rem; }
a { color: var(--accent); }
code { font: .86em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
.dim, figcaption { color: var(--dim); font-size: .9rem; }
.tags { display: flex; flex-wrap: wrap; gap: .4rem .5rem; padding: 0; margin: .9rem 0 0; list-style: none; }
.tags li { display: flex; align-items: center; gap: .4rem; padding: .1rem .65rem .1rem .5rem; border-radius: 1rem;
  border: 1px solid var(--line); background: var(--card); font-size: .88rem; }
.dot { width: .7rem; height: .7rem; border-radius: 50%; flex: none; }
nav { margin-top: 1rem; font-size: .92rem; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.note { border-left: 4px solid #e69f00; padding: .2rem .7rem; margin: .9rem 0 0; }
section { margin-top: 1.4rem; padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; }
.wide { overflow-x: auto; margin-bottom: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
thead th { color: var(--dim); font-weight: 600; }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 7%, transparent); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: "\\2195"; opacity: .35; padding-left: .15rem; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: .6rem auto 0; border-radius: .4rem; }
@media (prefers-color-scheme: dark) { figure img { background: #fff; padding: .5rem; } }
@media (max-width: 640px) { main { padding: 1.2rem .7rem 3rem; } section { padding: .9rem .8rem; } }
"""

SCRIPT = """\
const numberOf = text => { const n = parseFloat(text.replaceAll(",", "")); return Number.isNaN(n) ? null : n; };
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[head.cellIndex].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [numberOf(key(a)), numberOf(key(b))];
      return x === null || y === null ? key(a).localeCompare(key(b)) : x - y;
    };
    body.append(...[...body.rows].sort((a, b) => down ? compare(b, a) : compare(a, b)));
  });
}
// In MLflow's viewer the page is a blob in a sandboxed frame: links within it do nothing there, others leave it blank.
if (window.parent !== window) {
  for (const link of document.querySelectorAll("td a")) link.removeAttribute("href");
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", event => {
      event.preventDefault();
      document.querySelector(link.getAttribute("href")).scrollIntoView();
    });
  }
}
"""

TEMPLATE = (
    """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: comparison</title>
<link rel="icon" href="data:,">
<style>
"""
    + STYLE
    + """\
</style>
</head>
<body>
{% macro table(grid, sortable=true) %}
<p class="dim">{{ grid.caption }}</p>
<div class="wide">
<table id="{{ grid.id }}"{% if not sortable %} class="text"{% endif %}>
<thead><tr>
{% for title in grid.header %}
<th scope="col">{% if sortable %}<button type="button">{{ title }}</button>{% else %}{{ title }}{% endif %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for line in grid.cells %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<main>
<header>
<h1>{{ title }}</h1>
<p class="dim">{{ num_runs }} runs from <code>{{ source }}</code>, by {{ by }}{% if benchmark %}; validated on
{{ benchmark.name }}, {{ benchmark.samples }} completions of a problem{% endif %}.</p>
<ul class="tags">
{% for name, colour in entrants.items() %}
<li><span class="dot" style="background: {{ colour }}"></span>{{ name }}</li>
{% endfor %}
</ul>
<nav aria-label="On this page">
<a href="#numbers">Numbers</a>
{% for picture, _ in figures %}
<a href="#figure-{{ picture.name }}">{{ picture.title }}</a>
{% endfor %}
<a href="#settings">Parameters</a>
<a href="#runs">Runs</a>
</nav>
{% for text in notes %}
<p class="note">{{ text }}</p>
{% endfor %}
</header>
<section id="numbers">
<h2>Numbers</h2>
{% for grid in grids %}
{{ table(grid) }}
{% endfor %}
</section>
{% for picture, image in figures %}
<section id="figure-{{ picture.name }}">
<figure>
<h2>{{ picture.title }}</h2>
<figcaption>{{ picture.caption }}</figcaption>
<img src="{{ image.uri }}" width="{{ image.width }}" height="{{ image.height }}" alt="{{ picture.title }}">
</figure>
</section>
{% endfor %}
{% if missing %}
<section id="missing">
<h2>Figures left out</h2>
<ul>
{% for text in missing %}
<li>{{ text }}</li>
{% endfor %}
</ul>
</section>
{% endif %}
<section id="settings">
<h2>Parameters</h2>
{% if params.cells %}
{{ table(params, false) }}
{% else %}
<p class="dim">The entrants differ in no parameter.</p>
{% endif %}
</section>
<section id="runs">
<h2>Runs</h2>
<div class="wide">
<table>
<thead><tr>
{% for title in (by, "seed", "run", "id", "status", "iterations", "completions", "tokens", time_unit) %}
<th scope="col"><button type="button">{{ title }}</button></th>
{% endfor %}
</tr></thead>
<tbody>
{% for run in runs %}
<tr><td>{{ run.entrant }}</td><td>{{ run.seed }}</td><td>{{ run.name }}</td>
<td>{% if run.url %}<a href="{{ run.url }}">{% endif %}<code>{{ run.id }}</code>{% if run.url %}</a>{% endif %}</td>
<td>{{ run.status }}</td><td>{{ run.iterations }}</td><td>{{ run.completions }}</td><td>{{ run.tokens }}</td>
<td>{{ run.time }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if left_out %}
<h2>Runs left out</h2>
<ul>
{% for each in left_out %}
<li>{{ each.run }}: {{ each.reason }}</li>
{% endfor %}
</ul>
{% endif %}
</section>
</main>
<script>
"""
    + SCRIPT
    + """\
</script>
</body>
</html>
"""
)
