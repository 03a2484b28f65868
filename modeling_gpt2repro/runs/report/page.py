"""A report as one HTML file: its Markdown rendered, its pictures inside, nothing to be loaded from elsewhere."""

import re
from base64 import b64encode
from html import escape

from markdown_it import MarkdownIt

from .markdown import Report

# Pictures are drawn on white. In a dark page they are inverted, and the hues turned back, so that curves keep theirs.
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5c6066; --paper: #fff; --line: #e2e4e8; --tint: #f5f6f8;
        --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --dim: #a0a4ab; --paper: #141414; --line: #333638; --tint: #1e1f21; --accent: #56b4e9; }
  img { filter: invert(0.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p, li { overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; margin: .6rem 0 1rem; }
code { background: var(--tint); border-radius: 3px; padding: .1em .3em; font-size: .9em; }
.wide { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
thead:not(:has(th:not(:empty))) { display: none; }
td:first-child { color: var(--dim); }
td:first-child strong { color: var(--ink); }
td:last-child { padding-right: 0; }
td:nth-child(2):last-child { overflow-wrap: anywhere; }
td:nth-child(4) { color: var(--accent); letter-spacing: -.04em; } /* bars: only the table of times has four columns */
tr:has(:nth-child(4)) :nth-child(2) { white-space: nowrap; }
blockquote { margin: .8rem 0; padding: .7rem 1rem; background: var(--tint); border-left: 3px solid var(--accent);
             border-radius: 0 4px 4px 0; overflow-wrap: anywhere; }
blockquote p { margin: 0; font-family: Georgia, "Times New Roman", serif; }
blockquote p:first-child { color: var(--dim); font: 500 .82rem/1.6 system-ui, sans-serif; margin-bottom: .2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
dl div { background: var(--tint); border-radius: 6px; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .82rem; }
dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
@media print { main { max-width: none; padding: 0; } h2, img, blockquote, tr { break-inside: avoid; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def html_page(report: Report) -> str:
    """The whole page. What a model wrote, or somebody has put into run.json, can be nothing but text in it."""
    data = {name: f"data:image/png;base64,{b64encode(png).decode()}" for name, png in report.pictures.items()}
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    body = renderer.render(report.markdown(data))
    figures, rest = body.split("</table>", maxsplit=1)  # the first table: the key figures, as tiles that wrap
    lead, figures = figures.split("<table>")
    names, values = (re.findall(rf"<{cell}>(.*)</{cell}>", figures) for cell in ("th", "td"))
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in zip(names, values, strict=True))
    body = f"{lead}<dl>{tiles}</dl>{rest}"
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return PAGE.format(title=escape(report.title.replace("\\", "")), style=STYLE, body=body)
