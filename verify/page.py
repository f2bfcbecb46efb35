"""A page of HTML that stands alone: no network, no file beside it, and no script but its own, which sorts tables.

A content security policy allows only that script, by its hash. Everything that comes from a file is escaped. Colours
follow the reader's light or dark mode, and the keyboard reaches every table, heading that sorts, and fold.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from ..formats.text import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5a6270; --line: #e2e5ea; --ground: #fff; --ok: #1a7f4b;
  --bad: #b3261e; --mark: #2563a8 }
@media (prefers-color-scheme: dark) { :root { --ink: #d7dbe2; --soft: #98a1ae; --line: #2b313b; --ground: #0d1117;
  --ok: #4cc38a; --bad: #ff8a80; --mark: #7fb2ea } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th { font-weight: 600; color: var(--soft); white-space: nowrap }
td.n, th.n { text-align: right }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
th button::after { content: " \\2195"; opacity: .5 }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1 }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1 }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
.ok { color: var(--ok) } .bad { color: var(--bad) } ul.bad { padding-left: 1.1rem; overflow-wrap: anywhere }
p.note, figcaption, caption { color: var(--soft); font-size: .85rem; text-align: left }
caption { white-space: nowrap }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
blockquote { border-left: 3px solid var(--line); margin: 1rem 0; padding-left: 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
summary { cursor: pointer }
.wide { overflow-x: auto }
"""
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[at].textContent.replaceAll(",", "");
  const order = (a, b) => {
    const x = parseFloat(key(a)), y = parseFloat(key(b));
    if (Number.isNaN(x) || Number.isNaN(y)) return key(a).localeCompare(key(b), "en", { numeric: true });
    return x - y;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of these parts; `title` is text."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    head = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name=viewport content="width=device-width">',
        '<link rel=icon href="data:,">',
        f"<title>{escaped(title)}</title><style>{_STYLE}</style><main>",
    ]
    return "\n".join([*head, *parts, f"</main><script>{_SCRIPT}</script>"]) + "\n"


def escaped(text: object, keep: str = "") -> str:
    """Text of anybody's as HTML that shows it."""
    return escape(printable(str(text), keep=keep))


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], caption: str, sortable: bool = False
) -> str:
    """A table of text. Columns of numbers are aligned to the right, where the columns have titles.

    Where it is `sortable`, a column is sorted by a click on its title, or by the keyboard.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    numeric = [bool(title) and all(row[i][:1].isdigit() for row in texts) for i, title in enumerate(header)]
    marks = [" class=n" if right else "" for right in numeric]

    def title(text: str, mark: str) -> str:
        shown = escaped(text)
        return f"<th scope=col{mark}>{f'<button type=button>{shown}</button>' if sortable else shown}</th>"

    def cells(row: Sequence[str]) -> str:
        return "".join(f"<td{mark}>{escaped(cell)}</td>" for mark, cell in zip(marks, row, strict=True))

    titles = "".join(map(title, header, marks)) if any(header) else ""
    body = "".join(f"<tr>{cells(row)}</tr>" for row in texts)
    head, name = f"<thead><tr>{titles}</tr></thead>" if titles else "", escaped(caption)
    return (
        f'<div class=wide tabindex=0 role=region aria-label="{name}"><table><caption>{name}</caption>'
        f"{head}<tbody>{body}</tbody></table></div>"
    )


def figure(name: str, svg: str, caption: str) -> str:
    """A picture with what it shows, in words."""
    text = escape(caption)
    picture = svg.replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
    return f"<figure id={name}>{picture}<figcaption>{text}</figcaption></figure>"


def fold(title: str, inside: str) -> str:
    """What is shown when it is asked for; `inside` is HTML."""
    return f"<details><summary>{escaped(title)}</summary>{inside}</details>"
