"""`adapt --report`: a page about one run, rewritten at each evaluation, in a single file.

It has no script, needs no other file and loads nothing, so it can be mailed and opened anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minilora import tree
from minilora.adapters import LoRAConfig, adapters
from minilora.backend import Array, to_host
from minilora.formats.card import lora_facts
from minilora.formats.files import write_bytes
from minilora.model import Model
from minilora.training.checkpoint import History
from minilora.training.loop import Snapshot

STYLE = """
:root { color-scheme: light dark; --line: #2171b5; --held: #d94801; --faint: #8888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--faint); }
td.n, th.n { text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--faint);
  margin: .3rem 0 1rem; padding-left: .8rem; }
pre i { opacity: .6; font-style: normal; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
.scroll { overflow-x: auto; }
"""
WIDTH, HEIGHT, EDGE = 720, 260, 44  # of the curve, in pixels


@dataclass
class RunReport:
    """The page of a run that adapts `model`: `adapt(model, corpus, watch=RunReport(…).watch)`.

    `data` names what the run reads. At each evaluation the network so far trained continues
    `prompt`, if there is one.
    """

    path: str | Path
    model: Model
    data: Sequence[str] = ()
    prompt: str | None = None
    samples: list[tuple[int, str]] = field(default_factory=list, init=False)

    @property
    def title(self) -> str:
        """What is adapted, and to what."""
        to = [f"to {Path(name).name or name}" for name in self.data[:1]]
        return " ".join([self.model.base_name, "adapted", *to])

    def watch(self, seen: Snapshot) -> None:
        """Write the page at an evaluation; MiniloraError if it cannot be written.

        In a browser it reloads itself until the last step.
        """
        if self.prompt is not None:
            self.samples.append((seen.step, sampled(self.model, seen, self.prompt)))
        is_done = seen.step == seen.settings.steps
        state = f"finished after {seen.step} steps" if is_done else f"at step {seen.step}"
        reload = "" if is_done else '<meta http-equiv="refresh" content="5">'
        parts = [
            f"<h1>{escape(self.title)}</h1><p>{state}</p>",
            *section("Loss", [curve(seen.history)]),
            *section("Text", map(self.sample, self.samples)),
            *section("Settings", [html_table(["setting", "value"], named(self.facts(seen)))]),
            *section("Cost beside training all weights", [cost(seen)]),
        ]
        if seen.net.lora is not None and seen.net.lora_config is not None:
            parts += section("Adapters", [adapter_table(seen)])
            parts += section("Singular values of each update s A B", [spectra(seen)])
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8">{reload}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
        )
        write_bytes(Path(self.path), page.encode("utf-8", "replace"))

    def facts(self, seen: Snapshot) -> dict[str, Any]:
        """What is known before the run, by name."""
        facts: dict[str, Any] = {"base": self.model.base_name}
        if self.data:
            facts["data"] = " ".join(self.data)
        if seen.net.lora_config is not None:
            facts |= lora_facts(seen.net.lora_config)
        return facts | asdict(seen.settings)

    def sample(self, sample: tuple[int, str]) -> str:
        """A sample as HTML: its step, the prompt, the continuation."""
        step, text = sample
        prompt = escape(self.prompt or "")
        return f"<div>step {step}</div><pre><i>{prompt}</i>{escape(text)}</pre>"


def sampled(model: Model, seen: Snapshot, prompt: str) -> str:
    """The text, 100 tokens, with which the network of a snapshot continues a prompt.

    For instance `adapt(model, corpus, watch=lambda seen: print(sampled(model, seen, "def ")))`. The
    seed is the run's.
    """
    net = seen.net
    now = replace(model, base=net.base, lora=net.lora, lora_config=net.lora_config)
    return now.generate(prompt, max_tokens=100, seed=seen.settings.seed)


# --- parts of the page -------------------------------------------------------------------------


def cost(seen: Snapshot) -> str:
    """Trained parameters and AdamW's moments, beside those of training all weights."""
    every = tree.count(seen.net.base)
    count = every if seen.net.lora is None else tree.count(seen.net.lora)
    rows = [
        ("trained parameters", f"{count:,}", f"{every:,}"),
        ("AdamW's two moments, MB", f"{8e-6 * count:,.2f}", f"{8e-6 * every:,.2f}"),
        ("share of the base", f"{count / every:.2%}", "100%"),
    ]
    return html_table(["", "this run", "all weights"], rows)


def section(title: str, parts: Iterable[str]) -> list[str]:
    """A heading and its parts; nothing if there are no parts."""
    found = list(parts)
    return [f"<h2>{escape(title)}</h2>", *found] if found else []


def html_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as HTML; numbers are right-aligned."""
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>{body}</table></div>'


def named(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as rows of a table."""
    return [(name.replace("_", " "), shown(value)) for name, value in facts.items()]


def cell(value: Any) -> str:
    """One cell of a table."""
    if isinstance(value, float):
        return f'<td class="n">{value:,.4g}</td>'
    return f"<td>{escape(shown(value))}</td>"


def shown(value: Any) -> str:
    """A setting as text for a reader."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(shown, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def curve(history: History) -> str:
    """Both losses in nats per token against the step, as SVG."""
    points = [*history.train, *history.held_out]
    last, values = max(step for step, _ in points), [loss for _, loss in points]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0

    def place(step: int, loss: float) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * step / max(last, 1)
        y = EDGE / 2 + (HEIGHT - EDGE) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    def line(losses: Sequence[tuple[int, float]], style: str) -> str:
        places = " ".join(place(*point) for point in losses)
        return f'<polyline points="{places}" fill="none" style="{style}"/>'

    marks = "".join(
        f'<circle cx="{x}" cy="{y}" r="3" style="fill: var(--held)"/>'
        for x, y in (place(*point).split(",") for point in history.held_out)
    )
    base = HEIGHT - EDGE / 2
    (_, before), (_, after) = history.held_out[0], history.held_out[-1]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label='
        f'"Held-out loss from {before:.3f} to {after:.3f} nats per token">'
        f"{line(history.train, 'stroke: var(--line); opacity: .5')}"
        f"{line(history.held_out, 'stroke: var(--held); stroke-width: 2')}{marks}"
        f'<text x="2" y="{EDGE / 2 + 4}">{high:.2f}</text><text x="2" y="{base}">{low:.2f}</text>'
        f'<text x="{EDGE}" y="{HEIGHT - 4}">step 0</text>'
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 4}" text-anchor="end">step {last}</text></svg>'
        f"<p>Nats per token: the held-out loss (dots) went from {before:.3f} to {after:.3f}; "
        "the line without dots is each step's batch.</p>"
    )


def adapter_table(seen: Snapshot) -> str:
    """The Frobenius norms of every adapter's gradients at the last step, and of its update."""
    assert seen.net.lora is not None and seen.net.lora_config is not None
    grads = adapters(to_host(seen.grads)) if seen.grads is not None else {}
    rows = []
    for path, ab in adapters(to_host(seen.net.lora)).items():
        lengths = [float(np.linalg.norm(grads[path][name])) for name in "AB"] if grads else ["", ""]
        update = float(np.linalg.norm(singular_values(ab, path, seen.net.lora_config)))
        rows.append((path, *lengths, update))
    return html_table(["adapter", "|dA|", "|dB|", "|s A B|"], rows)


def singular_values(ab: Mapping[str, Array], path: str, config: LoRAConfig) -> Array:
    """The R largest singular values of s A B, in descending order, without computing the product.

    With A = P S and Bᵀ = Q T, P and Q orthonormal, A B = P (S Tᵀ) Qᵀ, and S Tᵀ is R × R.
    """
    S, T = np.linalg.qr(ab["A"])[1], np.linalg.qr(ab["B"].T)[1]
    return config.scale_of(path) * np.linalg.svd(S @ T.T, compute_uv=False)


def spectra(seen: Snapshot) -> str:
    """A bar for each singular value of each update, all on one scale."""
    assert seen.net.lora is not None and seen.net.lora_config is not None
    config = seen.net.lora_config
    found = {
        p: singular_values(ab, p, config) for p, ab in adapters(to_host(seen.net.lora)).items()
    }
    top = max(float(values.max(initial=0.0)) for values in found.values()) or 1.0
    rows = []
    for path, values in found.items():
        bars = "".join(
            f'<rect x="{9 * i}" y="{30 - 30 * v / top:.1f}" width="7" height="{30 * v / top:.1f}" '
            'style="fill: var(--line)"/>'
            for i, v in enumerate(values.tolist())
        )
        label = f"largest {values.max(initial=0.0):.3g}, smallest {values.min(initial=np.inf):.3g}"
        size = f'width="{9 * len(values)}" height="30"'
        drawn = f'<svg {size} role="img" aria-label="{label}">{bars}</svg>'
        rows.append(f"<tr><td>{escape(path)}</td><td>{drawn}</td><td>{label}</td></tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


# --- in a terminal -----------------------------------------------------------------------------

BARS = "▁▂▃▄▅▆▇█"


def sparkline(losses: Sequence[float], width: int = 40) -> str:
    """Losses as a row of at most `width` bars, the lowest loss the lowest bar; means of several."""
    if not losses:
        return ""
    means = [part.mean() for part in np.array_split(np.array(losses), min(width, len(losses)))]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
