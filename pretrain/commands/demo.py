"""Walk the whole road on a small slide, on this machine, in a few minutes.

    slides → tile shards → tile encoder → slide embeddings → slide encoder → exported encoders → report

Every step is the ordinary command with small settings, and is printed so that you can run it yourself. Stopped at any
moment, the same command continues; run again when it is done, it says so and where to look.

    pretrain demo
    pretrain demo slides="a.svs b.tiff"
    pretrain demo slides=a.svs slides_mpp=0.25 labelled=tiles

Without slides= it takes CMU-1-Small-Region (H&E, CC0), which 'make demo' puts beside the environment.
"""

import importlib
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data.fault import Fault
from models.allowed import ON_DISK, TILE, within
from pretrain.run.progress import duration, say
from pretrain.settings.composition import load

BUILT_IN = Path(sys.prefix) / "share" / "slidewright" / "CMU-1-Small-Region.svs"


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/demo.yaml``."""

    slides: Annotated[list[str] | None, ON_DISK]
    out: Annotated[str | None, ON_DISK]
    mpp: Annotated[float, within(above=0)]
    tile_size: Annotated[int, TILE]
    slides_mpp: str | None
    tile_steps: Annotated[int, within(least=1)]
    slide_steps: Annotated[int, within(least=1)]
    labelled: Annotated[str | None, ON_DISK]


@dataclass
class Step:
    """One command of the road, what it is for, and about how long it takes on two cores (seconds)."""

    purpose: str
    command: str
    overrides: list[str]
    seconds: float
    product: Path  # what is there once it is done


def run(config: Config) -> None:
    """Run every step that isn't done."""
    slides = config.slides or [built_in()]
    out = Path(config.out) if config.out else Path("demo") / folder_name(slides)
    steps = road(config, slides, out)
    if all(step.product.exists() for step in steps):
        say(f"{out} is done.")
    else:
        began, expected = time.monotonic(), sum(step.seconds for step in steps)
        behind = 0.0
        for number, step in enumerate(steps, start=1):
            gone = time.monotonic() - began
            # What is left by the plan, stretched by how this machine has done against it so far.
            left = (expected - behind) * (gone / behind if behind > 20 else 1.0)
            say(f"\n[{number}/{len(steps)}] {step.purpose}; about {duration(left)} left in all")
            say(f"  $ pretrain {step.command} {shlex.join(step.overrides)}")
            importlib.import_module(f"pretrain.commands.{step.command}").run(
                load(step.command, step.overrides).object()
            )
            behind += step.seconds
        say(f"\nThe whole road in {duration(time.monotonic() - began)}.")
    say(look(out))


def built_in() -> str:
    """The path of the real slide that 'make demo' brings. Raises Fault where it isn't there."""
    if not BUILT_IN.exists():
        raise Fault(
            f"the built-in slide is not at {BUILT_IN}: run 'make demo', which brings it, or give slides=\"a.svs"
            ' b.tiff".'
        )
    return str(BUILT_IN)


def folder_name(slides: list[str]) -> str:
    """A folder for these slides: their names, so that other slides get another folder."""
    names = sorted(Path(slide).stem for slide in slides)
    return "+".join(names[:3]) + (f"+{len(names) - 3}-more" if len(names) > 3 else "")


def road(config: Config, slides: list[str], out: Path) -> list[Step]:
    """The steps for ``slides`` in the folder ``out``."""
    shards, tile, embeddings, slide = (out / name for name in ("shards", "tile", "embeddings", "slide"))
    mpp = [f"slides_mpp={config.slides_mpp}"] if config.slides_mpp else []
    sharding = [
        f"slides={_listed(slides)}",
        f"out={shards}",
        f"mpp={config.mpp}",
        f"tile_size={config.tile_size}",
        *mpp,
    ]
    steps = [
        Step("find tissue and cut tiles", "shard", sharding, 4, shards / "index.npz"),
        Step(
            "train a tile encoder with DINOv2",
            "tile",
            [
                f"run={tile}",
                f"data.shards={shards}",
                f"optim.steps={config.tile_steps}",
                f"optim.warmup_steps={min(50, config.tile_steps)}",
                "trainer.checkpoint_every=30",
                "watch.every=30",
            ],
            2 * config.tile_steps,
            tile / "checkpoints" / f"step-{config.tile_steps:08d}",
        ),
        Step(
            "freeze it and embed the slide's tiles",
            "embed",
            [f"checkpoint={tile}", f"shards={shards}", f"out={embeddings}"],
            8,
            embeddings / "index-0.parquet",
        ),
        Step(
            "train a slide encoder as a masked autoencoder, on fields cut from the slides since they are few",
            "slide",
            [
                f"run={slide}",
                f"data.embeddings={embeddings}",
                f"optim.steps={config.slide_steps}",
                f"optim.warmup_steps={min(40, config.slide_steps)}",
            ],
            0.16 * config.slide_steps,
            slide / "checkpoints" / f"step-{config.slide_steps:08d}",
        ),
        Step(
            "export the tile encoder for timm",
            "export",
            [f"checkpoint={tile}", f"out={out / 'encoder'}"],
            4,
            out / "encoder" / "config.json",
        ),
        Step(
            "export the slide encoder in Prov-GigaPath's format",
            "export",
            [f"checkpoint={slide}", f"out={out / 'slide_encoder'}", "format=gigapath"],
            2,
            out / "slide_encoder" / "slide_encoder.pth",
        ),
    ]
    if config.labelled:
        probe = [f"checkpoint={tile}", f"train={config.labelled}", f"out={out / 'probe.json'}"]
        steps.append(Step("probe the tile encoder on labelled tiles", "probe", probe, 30, out / "probe.json"))
    steps.append(Step("put it all on one page", "report", [f"run={out}"], 8, out / "report.html"))
    return steps


def look(out: Path) -> str:
    """Where to look, in words."""
    return f"""
Where to look
  {out / "report.html"}     the page: open it in a browser
  {out / "tile"}            the tile encoder's run: config.yaml, metrics.jsonl, checkpoints/, samples/
  {out / "slide"}           the slide encoder's run
  {out / "encoder"}         timm.create_model("local-dir:{out / "encoder"}", pretrained=True)
  {out / "slide_encoder"}   slide_encoder.pth, with Prov-GigaPath's key names
A few minutes on one slide teach little; the road is the same for a thousand slides: 'pretrain tile --help'."""


def _listed(slides: list[str]) -> str:
    """Paths as one Hydra value."""
    return "[" + ",".join("'" + str(Path(slide).resolve()).replace("'", "\\'") + "'" for slide in slides) + "]"
