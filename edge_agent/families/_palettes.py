"""Colours for the classes of a segmented picture."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.errors import ModelError

Color = tuple[int, int, int]

_CITYSCAPES = (
    "804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"
)
_ADE20K = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652"
    "8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0"
    "ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff"
    "8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff"
    "00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff"
    "ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff"
    "00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070"
    "5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500"
    "0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
"""The data sets' own colours, six hexadecimal digits a class, as MMSegmentation (Apache-2.0) lists them."""

PALETTES = ("auto", "voc", "cityscapes", "ade20k")


def palette(wanted: str | Sequence[Color], labels: Sequence[str]) -> Sequence[Color]:
    """A colour (red, green, blue) for each label: a list, or a palette by name. `auto` knows Cityscapes and ADE20K by
    their labels, and takes PASCAL VOC's colours, which never end, for all others. Raises `ModelError`."""
    count = len(labels)
    if not isinstance(wanted, str):
        colors: Sequence[Color] = [(red, green, blue) for red, green, blue in wanted]
        if any(not 0 <= part <= 255 for color in colors for part in color):
            raise ModelError("options.palette: colours are [red, green, blue] in 0..255")
    elif wanted not in PALETTES:
        raise ModelError(f"options.palette: {wanted!r} is none of {', '.join(PALETTES)}, nor a list of colours")
    elif wanted == "cityscapes" or (wanted == "auto" and count == 19 and labels[0] == "road"):
        colors = _listed(_CITYSCAPES)
    elif wanted == "ade20k" or (wanted == "auto" and count == 150 and labels[0] == "wall"):
        colors = _listed(_ADE20K)
    else:
        colors = [_voc(index) for index in range(count)]
    if len(colors) < count:
        raise ModelError(f"options.palette has {len(colors)} colours for {count} classes")
    return tuple(colors[:count])


def _listed(digits: str) -> Sequence[Color]:
    numbers = bytes.fromhex(digits)
    return [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)]


def _voc(index: int) -> Color:
    """PASCAL VOC's colour of a class: its bits, dealt out to the three channels from the highest bit down."""
    channels = [0, 0, 0]
    for place in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= ((index >> channel) & 1) << place
        index >>= 3
    return channels[0], channels[1], channels[2]
