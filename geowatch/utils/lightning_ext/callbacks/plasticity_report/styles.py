"""
Colours and dashes of runs: a sequence of colours along the learning rate, dashes for batch sizes.
"""
from typing import NamedTuple

from .grid import axes, distinct

# Okabe and Ito's colours, which people with colour blindness can tell apart, less the yellow, pale on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
# The same where they would be too dark on a dark page.
DARK_COLOURS = ('#4BA3DB', '#F0813A', '#2FC499', '#DD9ABF', '#7CC7F0', '#F2B84B', '#E5E9ED')
# From low to high, read by lightness as much as by hue.
SEQUENCE = ('#2C0594', '#8707A6', '#C5407E', '#E8704F', '#EDA024')
DARK_SEQUENCE = ('#8E86F5', '#B874E8', '#E26A9C', '#F7986A', '#FBD24D')
# The two ends of the scale of the grid, as in page.css.
PALE, DEEP = '#eef4fb', '#0b4f8a'
DASHES = ('solid', 'dashed', 'dotted', 'dashdot')


class Style(NamedTuple):
    """
    Attributes:
        colour (str): on white
        dark (str): on a dark page
        dash (str): one of DASHES
    """
    colour: str
    dark: str
    dash: str


def styles(table):
    """
    How each run is drawn, the same in all pictures.

    Args:
        table (Table): of the runs

    Returns:
        List[Style]: by the settings that span the grid, or by their number where none differ
    """
    titles = axes(table)
    if not titles:
        count = len(COLOURS)
        return [Style(COLOURS[i % count], DARK_COLOURS[i % count], DASHES[i // count % len(DASHES)])
                for i in range(len(table.runs))]
    colours, dashes = [*(table.settings[title] for title in titles), [None] * len(table.runs)][:2]
    values, sizes = distinct(colours), distinct(dashes)
    places = [values.index(value) / max(1, len(values) - 1) for value in colours]
    return [Style(along(SEQUENCE, place), along(DARK_SEQUENCE, place), DASHES[sizes.index(size) % len(DASHES)])
            for place, size in zip(places, dashes, strict=True)]


def along(colours, place):
    """
    A colour between some.

    Args:
        colours (Sequence[str]): evenly spaced, as #rrggbb
        place (float): from 0 to 1

    Returns:
        str: as #rrggbb

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.styles import along
        >>> along(('#000000', '#204060', '#ffffff'), 0.25), along(('#000000', '#ffffff'), 1)
        ('#102030', '#ffffff')
    """
    k = min(int(place * (len(colours) - 1)), len(colours) - 2)
    part = place * (len(colours) - 1) - k
    low, high = ([int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in colours[k:k + 2])
    return '#' + ''.join(f'{round(a + part * (b - a)):02x}' for a, b in zip(low, high, strict=True))
