"""An inspection as one HTML file that needs nothing else: no script, font or picture from elsewhere."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from typing import TYPE_CHECKING

from matplotlib import colormaps, colors

from talklora_pl.monitoring import figures
from talklora_pl.monitoring.inspection import ExampleRouting, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"]

# metric -> what it says
METRICS = {
    "effective_experts": ("effective experts", "exp of the load's entropy: as many experts, evenly loaded"),
    "cv": ("CV", "standard deviation of the relative load; 0 is even"),
    "max_vio": ("MaxVio", "by how much the busiest expert is above its ideal load"),
    "dead_experts": ("dead experts", "share of experts with less than 1 % of their ideal load"),
    "token_entropy": ("token entropy", "how undecided a token's routing is; 0 decided, 1 undecided"),
    "margin": ("margin", "probability of a token's first expert minus its second"),
    "change": ("sensitivity", "relative change of the weights per relative change of the input"),
    "jacobian": ("Jacobian", "relative Frobenius norm of the derivative of the weights"),
}


def palette(experts: int) -> list[str]:
    """A colour per expert."""
    if experts <= len(COLOURS):
        return COLOURS[:experts]
    return [colors.to_hex(colormaps["viridis"](i / (experts - 1))) for i in range(experts)]


def picture(figure: Figure, words: str) -> str:
    """An ``img`` with the picture inside of it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def html(found: Inspection, title: str, facts: dict[str, str]) -> str:
    """The page.

    Args:
        found: what to show.
        title: of the page.
        facts: name -> value, shown on top.
    """
    load = found.load
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    body = [f"<h1>{escape(title)}</h1><table class=facts>{rows}</table>"]
    if load.layers:
        means = load.aggregates() | {key: float(value.nanmean()) for key, value in found.sensitivity.items()}
        body.append("<h2>Means over layers</h2><div class=cards>")
        for key, (name, words) in METRICS.items():
            body.append(f"<div class=card><b>{means[key]:.3g}</b>{name}<small>{words}</small></div>")
        body.append("</div>")
        body.append(_texts(found))
        body.append("<h2>Load</h2>" + picture(figures.load(load), "heat maps of the load of every expert"))
        if len(load.tasks) > 1:
            body.append("<h2>Tasks</h2>" + picture(figures.tasks(load), "heat maps of routing by task"))
    else:
        body.append("<p>Every layer has one expert: there is no routing to look at.</p>")
    if found.communication:
        body.append("<h2>Communication</h2>" + picture(figures.communication(found.communication), "who listens"))
    body.append("<h2>Experts</h2>" + picture(figures.allocation(found.experts), "experts per layer"))
    if load.layers:
        body.append(_table(found))
    return PAGE.replace("TITLE", escape(title)).replace("BODY", "\n".join(body))


def _texts(found: Inspection) -> str:
    """Tokens and weights as data; the page's script colours them, at first for the layer whose load is least even."""
    examples: list[ExampleRouting] = found.examples
    layers = list(examples[0].weights) if examples else []
    if not layers:
        return ""
    data = {
        "layers": [figures.short(name) for name in layers],
        "colours": [palette(examples[0].weights[name].shape[1]) for name in layers],
        "texts": [
            {
                "task": example.task,
                "tokens": example.tokens,
                # permille, which is what one sees
                "weights": [(example.weights[name] * 1000).round().int().tolist() for name in layers],
            }
            for example in examples
        ],
    }
    packed = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    uneven = dict(zip(found.load.layers, found.load.per_layer()["max_vio"].tolist(), strict=True))
    first = max(range(len(layers)), key=lambda i: uneven.get(layers[i], 0.0))
    options = "".join(
        f"<option value={i}{' selected' if i == first else ''}>{escape(figures.short(name))}"
        for i, name in enumerate(layers)
    )
    return (
        "<h2>Who speaks for which token</h2><p class=controls><label>layer <select id=layer>"
        f"{options}</select></label><label>show <select id=expert></select></label> <span id=legend></span></p>"
        "<p><small>The layer shown first is the one whose load is least even. "
        "Above a token: the expert with the largest weight; the stronger the colour, the larger that weight. "
        "Point at a token to see all weights; arrow keys in the list of layers walk through the model.</small></p>"
        f"<div id=texts></div><script type='application/json' id=data>{packed}</script>"
    )


def _table(found: Inspection) -> str:
    values = found.load.per_layer() | {
        key: value_L[[found.layers.index(name) for name in found.load.layers]]
        for key, value_L in found.sensitivity.items()
    }
    head = "".join(f'<th title="{words}">{name}</th>' for name, words in METRICS.values())
    lines = []
    for i, name in enumerate(found.load.layers):
        cells = "".join(f"<td>{float(values[key][i]):.3g}</td>" for key in METRICS)
        lines.append(f"<tr><th>{escape(name)}</th><td>{int(found.load.experts_L[i])}</td>{cells}</tr>")
    return (
        f"<details><summary>All numbers by layer</summary><table class=layers><tr><th>layer</th><th>experts</th>{head}"
        f"</tr>{''.join(lines)}</table></details>"
    )


PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>TITLE</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 1180px; margin: 1.5rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
img { width: 620px; max-width: 100%; } small { color: #555; } table { border-collapse: collapse; font-size: .9rem; }
.facts th { text-align: left; padding-right: 1.5rem; font-weight: 500; color: #555; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: .6rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .8rem; } .card small { display: block; }
.card b { display: block; font-size: 1.35rem; }
.controls { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; position: sticky; top: 0; background: #fff;
  padding: .4rem 0; border-bottom: 1px solid #ddd; } select { font: inherit; margin-left: .3rem; }
.text { border-left: 3px solid #ddd; padding: .2rem .8rem; margin: .8rem 0; line-height: 2.3; white-space: pre-wrap; }
.text small { display: block; line-height: 1.2; }
.token { border-radius: 3px; padding: 1px 0; border-bottom: 2px solid; } .token rt { font-size: .6rem; color: #555; }
.key { display: inline-block; margin-right: .7rem; } .key i { display: inline-block; width: .9rem; height: .9rem;
  border-radius: 3px; margin-right: .25rem; vertical-align: -2px; }
.layers td { text-align: right; padding: .1rem .6rem; } .layers th { text-align: left; padding: .1rem .6rem; }
.layers tr:nth-child(even) { background: #f5f5f5; } summary { cursor: pointer; margin: 2rem 0 .5rem; font-weight: 600; }
</style>
BODY
<script>
const source = document.getElementById("data");
if (source) {
  const data = JSON.parse(source.textContent), get = id => document.getElementById(id);
  const make = (kind, className, text) => {
    const e = document.createElement(kind); e.className = className; e.textContent = text ?? ""; return e;
  };
  const fade = (colour, a) => colour + Math.round(255 * Math.min(1, Math.max(0, a))).toString(16).padStart(2, "0");
  function draw() {
    const layer = +get("layer").value, colours = data.colours[layer], n = colours.length, one = get("expert").value;
    const rows = data.texts.flatMap(t => t.weights[layer]);
    const largest = Math.max(...rows.flatMap(w => one === "all" ? w : [w[one]])) || 1;
    const floor = one === "all" ? 1000 / n : 0;
    get("legend").replaceChildren(...colours.map((c, i) => {
      const key = make("span", "key"), box = make("i", ""); box.style.background = c;
      key.append(box, "expert " + i); return key;
    }));
    get("texts").replaceChildren(...data.texts.map(t => {
      const text = make("div", "text"); text.append(make("small", "", t.task));
      t.tokens.forEach((token, k) => {
        const w = t.weights[layer][k], best = w.indexOf(Math.max(...w)), e = one === "all" ? best : +one;
        const strength = (w[e] - floor) / Math.max(1, largest - floor);
        const span = make("ruby", "token", token.replace(/\\n/g, "⏎"));
        span.style.background = fade(colours[e], (one === "all" ? .12 : 0) + .75 * strength);
        span.style.borderColor = one === "all" ? colours[e] : "transparent";
        span.title = w.map((v, i) => "expert " + i + ": " + (v / 10).toFixed(1) + " %").join("\\n");
        span.append(make("rt", "", one === "all" ? e : ""));
        text.append(span, token.includes("\\n") ? "\\n" : "");
      });
      return text;
    }));
  }
  function choices() {
    const n = data.colours[+get("layer").value].length, before = get("expert").value || "all";
    get("expert").replaceChildren(new Option("strongest expert", "all"),
      ...Array.from({length: n}, (_, i) => new Option("weight of expert " + i, i)));
    get("expert").value = before < n || before === "all" ? before : "all";
    draw();
  }
  get("layer").addEventListener("input", choices); get("expert").addEventListener("input", draw); choices();
}
</script></html>
"""
