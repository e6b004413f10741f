"""What a command that embeds leaves behind it: files in other programs' formats, a line of JSON, and an error where a
slide was left out."""

import json
import time
from pathlib import Path
from typing import Any

from data.embeddings.h5 import EXPORTS, is_exported
from data.embeddings.store import EmbeddingStore
from data.fault import Fault
from pretrain.run.progress import say, track


def write_exports(kinds: list[str], out: Path, store: EmbeddingStore, slides: list[str]) -> None:
    """For each format of ``kinds`` the files of the slides that have none yet, in ``out/KIND``."""
    for kind in kinds:
        folder = out / kind
        absent = [slide for slide in slides if not is_exported(kind, slide, folder)]
        for slide in track(absent, len(absent), kind, "slides"):
            EXPORTS[kind](store, slide, folder)


def say_embedded(
    out: str, store: EmbeddingStore, failed: dict[str, str], new: int | None, began: float, further: dict[str, Any]
) -> None:
    """Say what is there and print it as JSON, with what is ``further`` to be told. Raises Fault where a slide was left
    out: ``failed`` gives the reasons. ``new`` slides were added since ``began``, by `time.monotonic`; None where none
    were to be."""
    tiles, seconds = sum(store.rows(slide) for slide in store.slides), time.monotonic() - began
    empty = sum(not store.rows(slide) for slide in store.slides)
    there = f"{out}: {len(store.slides)} slides, {tiles} tiles, {store.width} wide"
    there += f", {empty} of the slides without tissue" if empty else ""
    say(there if new != 0 or failed else f"{there}; all were there already, nothing to do")
    facts = {
        "out": out,
        "slides": len(store.slides),
        "tiles": tiles,
        "width": store.width,
        "encoder": store.encoder,
        "encoder_hash": store.encoder_hash,
        "new_slides": new or 0,
        "failed": failed,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(facts | further), flush=True)
    require_none_left_out(failed)


def require_none_left_out(failed: dict[str, str]) -> None:
    """End with an error where slides were left out."""
    if failed:
        first = next(iter(failed.values()))
        count = "a slide was" if len(failed) == 1 else f"{len(failed)} slides were"
        because = first if len(failed) == 1 else f"of the first, {first}"
        raise Fault(f"{count} left out, and will be tried again by the same command: {because}")
