"""How the report looks: its style sheet, the page around its sections, tables and tiles."""

from collections.abc import Sequence
from html import escape
from typing import Any

from radlads_jax.reporting.charts import HEAT_LEVELS, Real, short
from radlads_jax.reporting.run_log import number

# The palest and the strongest colour of the heat map with those between, for a light and for a dark page.
_HEAT_LIGHT = ("#f6efe3", "#f5c27a", "#e5683f", "#a81f4b", "#450a3c")
_HEAT_DARK = ("#262a36", "#5b2a5e", "#b8385b", "#f08a4b", "#ffe9a8")

# Nothing but what is in the file is ever loaded, and no script runs, whatever text a run brings.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--text:#1d2127;--soft:#5d6570;--rule:#e2e3e0;--bar:#dfe3ea;
--good:#16794c;--bad:#c0332b;--c1:#2a62c9;--c2:#c8641b;--c3:#158065;--c4:#8a45b5;%s}
@media (prefers-color-scheme:dark){:root{--page:#14161b;--card:#1c1f26;--text:#e6e8ec;--soft:#9aa3af;--rule:#30353f;
--bar:#333a46;--good:#58c794;--bad:#ff7f74;--c1:#7fabff;--c2:#ffa260;--c3:#55cfae;--c4:#ce9bf2;%s}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:38px 0 10px}
p{margin:6px 0;max-width:95ch}
.soft,.note,.none{color:var(--soft)}
.bad{color:var(--bad)}.good{color:var(--good)}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;margin:14px 0 0;font-size:.9rem}
a{color:var(--c1);text-decoration:none}a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.tile,figure,.scroll,.sample,details{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:12px 14px}
.tile b{display:block;font-size:1.45rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{font-size:.86rem;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,320px),1fr));gap:14px;margin-top:10px}
figure{display:flex;flex-direction:column;margin:0;padding:12px 14px 10px;min-width:0}
figcaption{margin-bottom:auto;padding-bottom:10px;line-height:1.35}
figcaption .note{display:block}
.note,.legend{font-size:.83rem}
.plot{padding:4px 6px 26px 44px}
.plot svg{display:block;overflow:visible}
.plot text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.plot .y{text-anchor:end}.plot .middle{text-anchor:middle}.plot .last{text-anchor:end}
.plot line{stroke:var(--rule);stroke-width:1}
.plot path{vector-effect:non-scaling-stroke}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.line.c2{stroke-dasharray:7 5}
.line.mark{stroke:var(--bad);stroke-width:1.5;opacity:.8}
.band{opacity:.22}
.band.c1{fill:var(--c1)}.band.c2{fill:var(--c2)}.band.c3{fill:var(--c3)}.band.c4{fill:var(--c4)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;color:var(--soft)}
.key{display:inline-block;width:18px;height:0;border-top:3px solid;vertical-align:middle;margin-right:6px}
.key.c1{border-color:var(--c1)}.key.c2{border-color:var(--c2);border-top-style:dashed}.key.c3{border-color:var(--c3)}
.key.c4{border-color:var(--c4)}.key.mark{border-color:var(--bad)}
[class^=h],.empty{shape-rendering:crispEdges}
.scale{width:130px;height:10px;vertical-align:middle;border-radius:2px}
.empty{fill:var(--bar);opacity:.35}
.over{fill:transparent}.over:hover{fill:var(--text);fill-opacity:.16}
.scroll{overflow-x:auto}.scroll+.scroll{margin-top:12px}
table{border-collapse:collapse;width:100%%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:.86rem}
tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{color:var(--soft);width:11em;vertical-align:top}
.progress{display:block;height:6px;min-width:90px;margin:4px 0 3px;
border-radius:3px;background:var(--bar);overflow:hidden}
.progress i{display:block;height:100%%;background:var(--c1)}
.sample{margin:0 0 12px;padding:12px 14px}
.sample p{margin:0 0 10px;max-width:none}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,300px),1fr));gap:12px}
.pair>div{min-width:0;border-left:3px solid var(--rule);padding-left:12px}
.pair .student{border-color:var(--c1)}
.pair b{font-size:.83rem;color:var(--soft)}
.text{white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:color-mix(in srgb,var(--c2) 24%%,transparent);color:inherit;border-radius:3px}
details{padding:10px 14px;margin-top:12px}
summary{cursor:pointer}
pre{overflow-x:auto;font-size:.83rem;margin:10px 0 0}
@media (max-width:560px){main{padding:18px 12px 40px}.plot{padding-left:40px}th,td{padding:7px 6px}
table{font-size:.92rem}
.tiles{grid-template-columns:repeat(2,1fr)}.facts td:first-child{width:8em}
.tile:last-child:nth-child(odd){grid-column:1/-1}.tile b{font-size:1.2rem}}
@media print{figure,.sample,.tile{break-inside:avoid}}
"""


def page(title: str, sections: Sequence[tuple[str, str, str]], head: str) -> str:
    """The whole HTML file. sections: (anchor, heading, HTML); head: HTML below the title, before the links."""
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    bodies = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{body}</section>' for anchor, heading, body in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_style_sheet()}</style></head><body><main><h1>{escape(title)}</h1>{head}<nav>{links}</nav>"
        f"{bodies}</main></body></html>\n"
    )


def _style_sheet() -> str:
    """_STYLE with the heat map's colours: variables for both kinds of page, and a class for each level."""
    light, dark = (
        "".join(f"--h{i}:{color};" for i, color in enumerate(_ramp(anchors, HEAT_LEVELS)))
        for anchors in (_HEAT_LIGHT, _HEAT_DARK)
    )
    levels = "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(HEAT_LEVELS))
    return _STYLE % (light, dark) + levels


def _ramp(anchors: Sequence[str], count: int) -> list[str]:
    """`count` colours at equal distances along straight lines between the anchors."""
    corners = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors]
    colors = []
    for i in range(count):
        place = i / (count - 1) * (len(corners) - 1)
        left = min(int(place), len(corners) - 2)
        mixed = [a + (b - a) * (place - left) for a, b in zip(corners[left], corners[left + 1], strict=True)]
        colors.append("#" + "".join(f"{round(part):02x}" for part in mixed))
    return colors


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide. columns: text; cells: HTML."""
    heads = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, both text; lines without a value are left out."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows if value)
    return f'<div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>'


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Large figures with what they are below, both text."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in items)
        + "</div>"
    )


def progress(done: int, of: int | None) -> str:
    share = min(done / of, 1.0) if of else 0.0
    return f'<span class="progress"><i style="width:{100 * share:.1f}%"></i></span>'


def charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def none(sentence: str) -> str:
    return f'<p class="none">{escape(sentence)}</p>'


def digits(value: Any) -> str:
    """Four decimals; empty for what is no finite number, as the functions below."""
    return "" if number(value) is None else f"{value:.4f}"


def percent(value: Any) -> str:
    return "" if number(value) is None else f"{value:.1%}"


def amount(value: Real | None) -> str:
    return "" if value is None else short(value)


def duration(seconds: Real | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
