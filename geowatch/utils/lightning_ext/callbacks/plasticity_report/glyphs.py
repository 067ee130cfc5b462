"""
Names in any script, in the pictures: drawn with a font that has them, or spelled out.
"""
import functools

# Matplotlib's own font has no letters of these scripts. What systems have for Chinese, Japanese and Korean.
_FALLBACKS = ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans CJK KR', 'Noto Sans SC', 'Noto Sans JP',
              'Noto Sans KR', 'Source Han Sans SC', 'WenQuanYi Micro Hei', 'WenQuanYi Zen Hei', 'Microsoft YaHei',
              'SimHei', 'PingFang SC', 'Hiragino Sans', 'Hiragino Sans GB', 'Yu Gothic', 'MS Gothic',
              'Apple SD Gothic Neo', 'Malgun Gothic', 'Arial Unicode MS')


@functools.cache
def families() -> list[str]:
    """
    Fonts to draw with, in the order in which they are asked for a letter.

    Returns:
        List[str]: Matplotlib's own, and those of the list above that this machine has
    """
    from matplotlib.font_manager import fontManager
    installed = {font.name for font in fontManager.ttflist}
    return ['DejaVu Sans', *(name for name in _FALLBACKS if name in installed)]


@functools.cache
def _letters():
    """ All that the fonts can draw, as numbers. """
    from matplotlib.font_manager import FontProperties, findfont, get_font
    return set().union(*(get_font(findfont(FontProperties(family=[name]))).get_charmap() for name in families()))


def drawable(text: str) -> str:
    """
    A text with every letter spelled out that no font here can draw, which would be an empty box.

    Args:
        text (str):

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.glyphs import drawable
        >>> drawable('größe.fc1'), drawable('\\U000F1234')
        ('größe.fc1', '\\\\U000f1234')
    """
    return text if text.isascii() else ''.join(
        letter if ord(letter) in _letters() else letter.encode('ascii', 'backslashreplace').decode()
        for letter in text)
