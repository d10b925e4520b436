"""Episodes as pictures: a strip to look at and a GIF to watch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .rollouts import Episode


INK, PAPER, GOOD, BAD = (30, 34, 40), (255, 255, 255), (30, 132, 73), (192, 57, 43)
MARGIN, LINE = 6, 24
FONT = ImageFont.load_default(size=14)


def _verdict(episode: Episode) -> tuple[str, tuple[int, int, int]]:
    return ("done", GOOD) if episode.success else ("not done", BAD)


def _lines(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a word is never broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and FONT.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_strip(episodes: Sequence[Episode], columns: int = 6) -> Image.Image:
    """One row an episode: `columns` frames from first to last under the instruction."""
    height, width = episodes[0].frames[0].shape[:2]
    row_height = height + LINE + MARGIN
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(episodes) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        top = MARGIN + row * row_height
        verdict, colour = _verdict(episode)
        draw.text((MARGIN, top), f"“{episode.instruction}”", fill=INK, font=FONT)
        label = f"{verdict} in {episode.steps} steps"
        draw.text((sheet.width - MARGIN, top), label, fill=colour, font=FONT, anchor="ra")
        for column, index in enumerate(np.linspace(0, len(episode.frames) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(episode.frames[index]), (MARGIN + column * (width + MARGIN), top + LINE))
    return sheet


def save_gif(episodes: Sequence[Episode], path: Path, columns: int = 3, frames_per_second: float = 5) -> None:
    """Play the episodes side by side under their instructions; each shows its verdict and waits when it has ended."""
    height, width = episodes[0].frames[0].shape[:2]
    captions = [_lines(episode.instruction, width) for episode in episodes]
    caption_height = LINE * max(map(len, captions))
    tile_height = caption_height + height + LINE
    rows = -(-len(episodes) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (tile_height + MARGIN) + MARGIN)
    length = max(len(episode.frames) for episode in episodes)
    pictures = []
    for index in range(length + int(frames_per_second)):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        for number, (episode, caption) in enumerate(zip(episodes, captions, strict=True)):
            left = MARGIN + (number % columns) * (width + MARGIN)
            top = MARGIN + (number // columns) * (tile_height + MARGIN)
            # The last line touches the picture, however many there are.
            for line, text in enumerate(reversed(caption), start=1):
                draw.text((left, top + caption_height - line * LINE + 3), text, fill=INK, font=FONT)
            frame = episode.frames[min(index, len(episode.frames) - 1)]
            picture.paste(Image.fromarray(frame), (left, top + caption_height))
            if index >= len(episode.frames) - 1:
                verdict, colour = _verdict(episode)
                corner = (left + width, top + caption_height + height + 3)
                draw.text(corner, verdict, fill=colour, font=FONT, anchor="ra")
        pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
        optimize=True,
    )
