"""
Text and numbers that others have written, as they can be drawn: a file in a log folder may hold anything.
"""
import math

# Of whole numbers: up to here floats know each of them.
LARGEST = 1 << 53
# Of text in pictures and tables.
MOST_CHARACTERS = 200


def readable(text, most=MOST_CHARACTERS):
    """
    One line that can be printed, drawn and encoded.

    Args:
        text (str): any
        most (int): the most characters; a longer text loses its middle

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.foreign import readable
        >>> readable('a\\nb\\ud800'), readable('blocks.11.attention', 10)
        ('a b ', 'bloc\u2026tion')
    """
    if len(text) > most:
        half = (most - 1) // 2
        text = f'{text[:half]}\u2026{text[-half:]}'
    return text if text.isprintable() else ''.join(x if x.isprintable() else ' ' for x in text)


def finite(number):
    """
    A number as a float.

    Args:
        number (Any): None stands for one that is not finite

    Returns:
        float: nan for what is not finite, or too large for a float

    Raises:
        TypeError | ValueError: if it is no number

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.foreign import finite
        >>> finite(3), finite(None), finite(10 ** 400)
        (3.0, nan, nan)
    """
    try:
        number = math.nan if number is None else float(number)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def whole(number, least=0):
    """
    A whole number, such as a step.

    Args:
        number (Any):
        least (int): the least that makes sense

    Returns:
        int:

    Raises:
        TypeError | ValueError: if it is none, or beyond all bounds

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.foreign import whole
        >>> whole('12')
        12
        >>> whole(float('inf'))
        Traceback (most recent call last):
        ...
        ValueError: Expected a whole number from 0 to 9007199254740992, but got inf
    """
    if isinstance(number, float) and not math.isfinite(number) or not least <= int(number) <= LARGEST:
        raise ValueError(f'Expected a whole number from {least} to {LARGEST}, but got {readable(repr(number))}')
    return int(number)
