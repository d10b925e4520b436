"""Draw rollouts as a strip of frames or as a GIF."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..suites.suite import Rollout


INK, PAPER, GOOD, BAD = (30, 34, 40), (255, 255, 255), (30, 132, 73), (192, 57, 43)
MARGIN, LINE = 6, 24
COLOURS = 64
FONT = ImageFont.load_default(size=14)


def _verdict(rollout: Rollout) -> tuple[str, tuple[int, int, int]]:
    return ("done", GOOD) if rollout.success else ("not done", BAD)


def _lines(text: str, width: int) -> list[str]:
    """Break a text between words into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and FONT.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_strip(rollouts: Sequence[Rollout], columns: int = 6) -> Image.Image:
    """Draw one row for each rollout: its instruction above `columns` frames, from first to last."""
    height, width = rollouts[0].frames[0].shape[:2]
    row_height = height + LINE + MARGIN
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, len(rollouts) * row_height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, rollout in enumerate(rollouts):
        top = MARGIN + row * row_height
        verdict, colour = _verdict(rollout)
        draw.text((MARGIN, top), f"“{rollout.instruction}”", fill=INK, font=FONT)
        label = f"{verdict} in {rollout.steps} steps"
        draw.text((sheet.width - MARGIN, top), label, fill=colour, font=FONT, anchor="ra")
        for column, index in enumerate(np.linspace(0, len(rollout.frames) - 1, columns).round().astype(int)):
            sheet.paste(Image.fromarray(rollout.frames[index]), (MARGIN + column * (width + MARGIN), top + LINE))
    return sheet


def save_gif(rollouts: Sequence[Rollout], path: Path, columns: int = 3, frames_per_second: float = 5) -> None:
    """Write a GIF that plays the rollouts side by side, each under its instruction and with its outcome at the end."""
    height, width = rollouts[0].frames[0].shape[:2]
    captions = [_lines(rollout.instruction, width) for rollout in rollouts]
    caption_height = LINE * max(map(len, captions))
    tile_height = caption_height + height + LINE
    rows = -(-len(rollouts) // columns)
    size = (columns * (width + MARGIN) + MARGIN, rows * (tile_height + MARGIN) + MARGIN)
    length = max(len(rollout.frames) for rollout in rollouts)
    pictures = []
    for index in range(length + int(frames_per_second)):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        for number, (rollout, caption) in enumerate(zip(rollouts, captions, strict=True)):
            left = MARGIN + (number % columns) * (width + MARGIN)
            top = MARGIN + (number // columns) * (tile_height + MARGIN)
            # Captions are aligned at the bottom, whatever their number of lines.
            for line, text in enumerate(reversed(caption), start=1):
                draw.text((left, top + caption_height - line * LINE + 3), text, fill=INK, font=FONT)
            frame = rollout.frames[min(index, len(rollout.frames) - 1)]
            picture.paste(Image.fromarray(frame), (left, top + caption_height))
            if index >= len(rollout.frames) - 1:
                verdict, colour = _verdict(rollout)
                corner = (left + width, top + caption_height + height + 3)
                draw.text(corner, verdict, fill=colour, font=FONT, anchor="ra")
        pictures.append(picture)
    # One palette for all pictures, that of the last with its verdicts: what does not change takes no space.
    palette = pictures[-1].quantize(COLOURS)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
        optimize=True,
    )
