"""How are training curves plotted?

Colours and line styles stay distinguishable for colour-blind readers and in grey; the name of each
line is printed at its end.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow that white paper swallows.
COLOURS = ('#000000', '#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
STYLES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)))  # so many that pairs repeat after 35
FINAL = 1 / 3  # share of the steps that the second panel enlarges
GAP = 0.055  # share of a panel's height between two names
SIZE = (11, 4.5)  # inches
MARGIN = 0.05  # share of the range of losses, above and below it

Curve = Sequence[tuple[int, float]]
Style = str | tuple[int, tuple[int, ...]]


def plot(curves: Mapping[str, Sequence[Curve]], seeds: str, path: Path) -> None:
    """Writes a PNG: the mean of every config over seeds, in a band from lowest to highest.

    Args:
        curves: by config, one curve of (step, loss) pairs per seed, at the same steps.
        seeds: the number of seeds in words.
        path: the file.
    """
    figure = Figure(figsize=SIZE, dpi=150, layout='constrained')
    full, end = figure.subplots(1, 2, width_ratios=(1, 1))
    bands = {name: _band(runs_of_config) for name, runs_of_config in curves.items()}
    for axes in (full, end):
        for number, band_4P in enumerate(bands.values()):
            _plot_band(axes, band_4P, number)
        axes.set_xlabel('steps')
        axes.grid(alpha=0.25)
    full.set_ylabel('held-out loss')
    full.set_title(f'mean of {seeds}, band from lowest to highest', fontsize='medium')
    end.set_title('the end, enlarged', fontsize='medium')
    _enlarge(end, list(bands.values()))
    _name_ends(end, bands)
    figure.savefig(path, format='png', metadata={'Software': None})


def spread(heights: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Moves positions as little as needed until neighbours are `gap` apart.

    Args:
        heights: the positions, in any order.
        gap: least distance of two neighbours.
        top: the positions stay in [0, top].

    Returns:
        The new positions, in the order of `heights`.
    """
    order = np.argsort(heights, kind='stable')
    # Minus the gaps below each, positions only have to be ascending: average those that are not.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([heights[index] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    risen = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    highest = max(top - (len(order) - 1) * gap, 0.0)
    moved = np.empty(len(order))
    moved[order] = np.clip(risen, 0.0, highest) + gap * np.arange(len(order))
    return moved.tolist()


def _band(curves: Sequence[Curve]) -> np.ndarray:
    """[4, P]: steps, mean, lowest and highest loss."""
    steps_P = np.array([step for step, _ in curves[0]])
    losses_NP = np.array([[loss for _, loss in curve] for curve in curves])
    return np.stack([steps_P, losses_NP.mean(0), losses_NP.min(0), losses_NP.max(0)])


def _plot_band(axes: Axes, band_4P: np.ndarray, number: int) -> None:
    steps_P, mean_P, low_P, high_P = band_4P
    colour, style = _style(number)
    axes.fill_between(steps_P, low_P, high_P, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps_P, mean_P, color=colour, linestyle=style, marker='.', markersize=4)


def _enlarge(axes: Axes, bands: Sequence[np.ndarray]) -> None:
    """Shows only the last steps, with at least two points of every line."""
    last = max(band_4P[0, -1] for band_4P in bands)
    first = min([last * (1 - FINAL), *(band_4P[0, -2:][0] for band_4P in bands)])
    shown = np.concatenate([band_4P[2:, band_4P[0] >= first] for band_4P in bands], axis=1)
    low, high = shown.min(), shown.max()
    margin = MARGIN * (high - low) or MARGIN
    axes.set_xlim(first, last if last > first else first + 1)
    axes.set_ylim(low - margin, high + margin)


def _name_ends(axes: Axes, bands: Mapping[str, np.ndarray]) -> None:
    """Prints the name of each line to the right of its end, connected by a piece of the line."""
    low, high = axes.get_ylim()
    heights = [(band_4P[1, -1] - low) / (high - low) for band_4P in bands.values()]
    for number, (name, height, free) in enumerate(
        zip(bands, heights, spread(heights, GAP), strict=True)
    ):
        colour, style = _style(number)
        axes.annotate(
            name,
            xy=(1.0, height),
            xytext=(1.1, free),
            xycoords='axes fraction',
            textcoords='axes fraction',
            va='center',
            fontsize='small',
            parse_math=False,
            arrowprops={
                'arrowstyle': '-',
                'color': colour,
                'linestyle': style,
                'linewidth': 1.5,
                'relpos': (0.0, 0.5),  # the line ends at the left of the name
            },
        )


def _style(number: int) -> tuple[str, Style]:
    """Colour and line style of the config with a number."""
    return COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
