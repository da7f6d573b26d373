"""Figures for papers: means with intervals as SVG, and as pages of one PDF, the same to the byte every time."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleeperbench.leaderboard import charts, words
from sleeperbench.leaderboard.names import clean, file_name
from sleeperbench.leaderboard.summary import Board, attacked, by_state, role
from sleeperbench.leaderboard.views import Views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PDF = "downloads/figures/figures.pdf"
"""All figures, a page each: fonts are embedded once, which takes longer than drawing."""
MOST = 50
"""Largest number of figures in one build: each takes a good part of a second."""
AGAINST = ("p_asr", "bec", "c_acc")
LOOKS = {"defense": ("o", "#0072b2"), "control": ("s", "#c46200"), "oracle": ("^", "#8a4a80")}
SETTINGS: Any = {
    "svg.hashsalt": "sleeperbench",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "text.usetex": False,
}
WIDTH, HEIGHT = 5.5, 3.6
LETTER = 9
"""About how wide a letter of a label is where the axes are as wide as `charts.WIDTH`."""


@dataclass(frozen=True)
class Figure:
    """A figure on the page of figures: its file from the site's root, its page in PDF, and what it shows."""

    svg: str
    page: int
    title: str
    caption: str


@dataclass(frozen=True)
class _Mark:
    name: str
    role: str
    collapsed: bool
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def _marks(views: Views, board: Board, metric: str) -> list[_Mark]:
    """(value, low, high) of both axes of every defense that has the two means: of whole models, and of ruined ones."""
    marks = []
    for d in board.repairs:
        cells = attacked(board.of_defense[d])
        for ruined, some in by_state(cells).items():
            x, y = (views.drawn(some, m).estimate for m in ("o_asr", metric))
            if x is not None and y is not None:
                ends = (x.value, x.low, x.high), (y.value, y.low, y.high)
                marks.append(_Mark(clean(d), role(cells[0]), ruined, *ends))
    return marks


def _draw(marks: Sequence[_Mark], metric: str, *, share: bool) -> Canvas:
    """A picture of these marks."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import PercentFormatter

    canvas = Canvas(figsize=(WIDTH, HEIGHT))
    axes = canvas.add_axes((0.11, 0.12, 0.62, 0.8))  # room at the right for names of marks near 100 %
    for (kind, (shape, colour)), ruined in itertools.product(LOOKS.items(), (False, True)):
        mine = [m for m in marks if m.role == kind and m.collapsed is ruined]
        if not mine:
            continue
        spans: list[Any] = [
            [[max(0.0, a[0] - a[1]) for a in axis], [max(0.0, a[2] - a[0]) for a in axis]]
            for axis in ([m.x for m in mine], [m.y for m in mine])
        ]
        x, y = [m.x[0] for m in mine], [m.y[0] for m in mine]
        style: dict[str, Any] = {"fmt": shape, "color": colour, "ecolor": "#8a939c", "markersize": 4.5}
        name = f"{kind}, collapsed" if ruined else kind
        if ruined:
            style["markerfacecolor"] = "white"
        axes.errorbar(x, y, xerr=spans[0], yerr=spans[1], label=name, elinewidth=0.6, **style)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("O-ASR")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(words.label(metric))
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axes, marks)
    axes.grid(visible=True, linewidth=0.3, color="#d0d7de")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=4, fontsize=7)  # above all marks
    return canvas


def _label(axes: Axes, marks: Sequence[_Mark]) -> None:
    """The names beside their marks, moved up where they would cover each other, and then with a line to their mark."""
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    wide, tall = (right - left) / charts.WIDTH, (high - low) / charts.HEIGHT
    lines = []
    names = [charts.short(m.name) for m in marks]
    wanted = [
        ((m.x[0] - left) / wide + 8, (high - m.y[0]) / tall - 4, LETTER * len(name))
        for m, name in zip(marks, names, strict=True)
    ]
    for m, name, (x, y, _), height in zip(marks, names, wanted, charts.spread(wanted), strict=True):
        at = left + x * wide, high - height * tall
        axes.text(*at, name, fontsize=6, path_effects=[withStroke(linewidth=1.8, foreground="white")])
        if abs(y - height) > 6:
            lines.append(((m.x[0], m.y[0]), at))
    axes.add_collection(LineCollection(lines, colors="#8a939c", linewidths=0.4, zorder=1.5), autolim=False)


def figures(views: Views, write: Callable[[str, bytes], None]) -> list[Figure]:
    """O-ASR against P-ASR, BEC and C-Acc of each board, boards in order, at most MOST; `write` takes the files."""
    wanted = [(b, m) for b in views.boards for m in AGAINST if m in b.metrics and "o_asr" in b.metrics]
    drawable = [(b, m, marks) for b, m in wanted if (marks := _marks(views, b, m))][:MOST]
    if not drawable:
        return []
    import matplotlib as mpl
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    made = []
    pdf = io.BytesIO()
    nameless = {"CreationDate": None, "Creator": None, "Producer": None}
    with mpl.rc_context(SETTINGS), warnings.catch_warnings(), PdfPages(pdf, metadata=nameless) as pages:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that the font lacks
        for n, (board, metric, marks) in enumerate(drawable):
            canvas = _draw(marks, metric, share=views.share(metric))
            svg = io.BytesIO()
            FigureCanvasSVG(canvas).print_svg(svg, metadata={"Date": None, "Creator": None})
            pages.savefig(canvas)
            path = f"downloads/figures/{file_name(':'.join(board.key))}-{file_name(metric)}.svg"
            write(path, svg.getvalue())
            title = f"{board.title}: O-ASR against {words.label(metric)}"
            caption = (
                f"Means of {len({m.name for m in marks})} defenses, controls and oracles over attack settings, with "
                "their intervals, of what was measured: circles are defenses, squares controls, triangles oracles"
                f"{'; hollow are the models that collapsed' if any(m.collapsed for m in marks) else ''}."
            )
            made.append(Figure(path, n + 1, title, caption))
    write(PDF, pdf.getvalue())
    return made
