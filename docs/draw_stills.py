"""Draw stills of every policy in `model_cards/`, for its page there: `python docs/draw_stills.py`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from meam_export.report.film import render_film

CARDS = Path(__file__).parents[1] / "model_cards"
STILLS, HEIGHT, GAP, COLOURS = 5, 180, 6, 96
SEED = 1_000_000
"""That of the first evaluation episode of the demo."""


def stills(film: Path) -> Image.Image:
    """Frames of a film side by side, from its first to its last."""
    with Image.open(film) as frames:
        last: int = getattr(frames, "n_frames", 1) - 1
        chosen = []
        for k in range(STILLS):
            frames.seek(round(k * last / (STILLS - 1)))
            still = frames.convert("RGB")
            chosen.append(still.resize((round(still.width * HEIGHT / still.height), HEIGHT)))
    width = chosen[0].width
    strip = Image.new("RGB", (STILLS * (width + GAP) - GAP, HEIGHT), "white")
    for k, still in enumerate(chosen):
        strip.paste(still, (k * (width + GAP), 0))
    return strip.quantize(COLOURS)


def main() -> int:
    """Draw them all; returns the exit code."""
    for policy in sorted(config.parent for config in CARDS.glob("*/config.json")):
        with tempfile.TemporaryDirectory() as folder:
            film = Path(folder) / "film.webp"
            if reason := render_film(policy, film, SEED):
                print(f"{policy.name}: {reason}", file=sys.stderr)
                return 1
            stills(film).save(policy / "stills.png", optimize=True)
        print(f"{policy / 'stills.png'}: {(policy / 'stills.png').stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
