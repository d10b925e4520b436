"""Episodes as pictures: a strip to look at and a GIF to watch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rollouts import Episode


INK, PAPER, GOOD, BAD = (30, 34, 40), (255, 255, 255), (30, 132, 73), (192, 57, 43)
MARGIN, CAPTION = 6, 24


def _caption(draw: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    draw.text(xy, text, fill=colour, font=ImageFont.load_default(size=14))


def _verdict(episode: Episode) -> tuple[str, tuple[int, int, int]]:
    return ("done", GOOD) if episode.success else ("not done", BAD)


def draw_strip(episodes: Sequence[Episode], columns: int = 6) -> Image.Image:
    """One row an episode: `columns` frames from first to last under the instruction."""
    height, width = episodes[0].frames[0].shape[:2]
    row_height = height + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(episodes) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        top = MARGIN + row * row_height
        verdict, colour = _verdict(episode)
        _caption(draw, (MARGIN, top), f"“{episode.instruction}”", INK)
        label = f"{verdict} in {episode.steps} steps"
        _caption(draw, (sheet.width - MARGIN - 8 * len(label), top), label, colour)
        for column, index in enumerate(np.linspace(0, len(episode.frames) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(episode.frames[index]), (MARGIN + column * (width + MARGIN), top + CAPTION))
    return sheet


def save_gif(episodes: Sequence[Episode], path: Path, columns: int = 3, frames_per_second: float = 5) -> None:
    """Play the episodes side by side; each shows its verdict and waits when it has ended."""
    height, width = episodes[0].frames[0].shape[:2]
    tile_height = height + 2 * CAPTION
    rows = -(-len(episodes) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (tile_height + MARGIN) + MARGIN)
    length = max(len(episode.frames) for episode in episodes)
    pictures = []
    for index in range(length + int(frames_per_second)):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        for number, episode in enumerate(episodes):
            left = MARGIN + (number % columns) * (width + MARGIN)
            top = MARGIN + (number // columns) * (tile_height + MARGIN)
            ended = index >= len(episode.frames) - 1
            picture.paste(Image.fromarray(episode.frames[min(index, len(episode.frames) - 1)]), (left, top + CAPTION))
            words = episode.instruction.split()
            half = (len(words) + 1) // 2
            lines = (
                [" ".join(words)]
                if len(episode.instruction) < 30
                else [" ".join(words[:half]), " ".join(words[half:])]
            )
            _caption(draw, (left, top + 3), lines[0], INK)
            if len(lines) > 1:
                _caption(draw, (left, top + CAPTION + height + 3), lines[1], INK)
            if ended:
                verdict, colour = _verdict(episode)
                _caption(draw, (left + width - 8 * len(verdict), top + CAPTION + height + 3), verdict, colour)
        pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
        optimize=True,
    )
