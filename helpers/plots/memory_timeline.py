"""Draw the memory of a job's GPUs over time."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.memory.phases import Phase, across_ranks
from helpers.memory.timeline import GpuCurve, Timeline
from helpers.memory.units import GIB
from helpers.plots.style import RANK_COLOURS, SMALL_SIZE, TEXT_SIZE, CourseFigure, label_axes, new_figure, paler

# Paul Tol's light scheme: pale enough to lie behind curves in any of RANK_COLOURS.
PHASE_TINTS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAAAA")
NARROWEST_PHASE = 0.004  # as a share of the axis: shorter phases would be invisible, so they are drawn this wide
LEAD = 0.1  # how much is shown before the first phase, as a share of the time after it


def memory_timeline(timeline: Timeline, phases: Sequence[Phase], title: str) -> CourseFigure:
    """Draw the used memory of every GPU over the seconds of a job, with the phases that its ranks marked.

    Each GPU has its own row on a common scale: GPUs that do the same would hide each other in a single row. A band
    above has one row per phase name, so names never overlap, however short a phase is. A phase of several ranks is
    drawn once, from the first start to the last end. Of overlapping phases, the last to begin is behind the curves.
    Next to each curve are its baseline and its peak. GPUs that the job does not use are only named, and most of the
    time before the first phase, in which Python imports libraries, is left out.

    Args:
        timeline: The measured curves; without any, the figure shows the timeline's note.
        phases: The phases of all ranks.
        title: The figure's title.

    Returns:
        The figure.
    """
    spans = _phase_spans(timeline, phases)
    names = list(dict.fromkeys(name for name, _, _ in spans))
    tints = {name: PHASE_TINTS[row % len(PHASE_TINTS)] for row, name in enumerate(names)}
    band_heights = [0.1 + 0.27 * len(names)] if names else []
    gpus = [gpu for gpu in timeline.gpus if gpu.peak > gpu.baseline] or timeline.gpus
    row_heights = [max(1.0, 4.2 / len(gpus))] * len(gpus) if gpus else [1.6]
    fig = new_figure(title, width=13, height=1.2 + sum(band_heights + row_heights) + 0.2 * len(row_heights))
    panels = fig.subplots(
        len(band_heights + row_heights), 1, sharex=True, squeeze=False, height_ratios=band_heights + row_heights
    )[:, 0]
    if names:
        _draw_phase_band(panels[0], spans, names, tints)
    rows = panels[len(band_heights) :]
    for axes in rows:
        label_axes(axes, "", "", "GiB")
        for name, start, end in sorted(spans, key=lambda span: span[1]):
            # Opaque, so that a phase has one tint everywhere, and below the grid.
            axes.axvspan(start, end, color=paler(tints[name], 0.6), linewidth=0, zorder=0.1)
    begin = _axis_begin(timeline, spans)
    for axes, gpu in zip(rows, gpus, strict=False):
        _draw_gpu_curve(axes, gpu, RANK_COLOURS[gpu.index % len(RANK_COLOURS)], begin, small=len(gpus) > 2)
        axes.set_ylim(0, 1.12 * max(other.peak for other in gpus) / GIB)
    unused = ", ".join(str(gpu.index) for gpu in timeline.gpus if gpu not in gpus)
    note = f" (GPU {unused}: not used)" if unused else ""
    rows[0].set_title(f"used memory of each GPU, read from NVML{note}", fontsize=TEXT_SIZE, loc="left")
    if not gpus:
        rows[0].set_yticks([])
        rows[0].text(
            0.5, 0.5, timeline.note, transform=rows[0].transAxes, ha="center", va="center", fontsize=TEXT_SIZE
        ).set_bbox({"facecolor": "white", "edgecolor": "none"})
    rows[-1].set_xlabel("seconds since the start", fontsize=TEXT_SIZE)
    rows[-1].set_xlim(begin, _axis_end(timeline))
    return fig


def _draw_gpu_curve(axes: Axes, gpu: GpuCurve, colour: str, begin: float, small: bool) -> None:
    axes.plot(gpu.seconds, [used / GIB for used in gpu.used], color=colour, linewidth=1.8)
    before = max(gpu.seconds[0], begin)
    for second, used, marker in ((before, gpu.baseline, "o"), (gpu.peak_seconds, gpu.peak, "^")):
        axes.plot(second, used / GIB, marker, color=colour, markersize=9, markeredgecolor="white", clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if small else 8, steps=[1, 2, 5, 10]))
    axes.text(
        1.01,
        0.5,
        f"GPU {gpu.index}\n\u25cf before {gpu.baseline / GIB:.1f} GiB\n\u25b2 peak {gpu.peak / GIB:.1f} GiB",
        transform=axes.transAxes,
        va="center",
        fontsize=SMALL_SIZE,
        color=colour,
    )


def _axis_begin(timeline: Timeline, spans: Sequence[tuple[str, float, float]]) -> float:
    first = min((start for _, start, _ in spans), default=0.0)
    return max(0.0, first - LEAD * (_axis_end(timeline) - first))


def _axis_end(timeline: Timeline) -> float:
    return max(timeline.duration, 0.01)


def _phase_spans(timeline: Timeline, phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    """List (name, start, end) in seconds of the timeline, clipped to it; an open phase lasts until its end."""
    axis_end = _axis_end(timeline)
    spans = []
    for phase in across_ranks(phases):
        start = phase.start - timeline.start
        end = axis_end if phase.end is None else phase.end - timeline.start
        if end >= 0 and start <= axis_end:
            start, end = max(start, 0.0), min(end, axis_end)
            spans.append((phase.name, start, max(end, start + NARROWEST_PHASE * axis_end)))
    return spans


def _draw_phase_band(
    axes: Axes, spans: Sequence[tuple[str, float, float]], rows: Sequence[str], tints: Mapping[str, str]
) -> None:
    for name, start, end in spans:
        axes.broken_barh([(start, end - start)], (rows.index(name) - 0.4, 0.8), color=tints[name])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=TEXT_SIZE)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
