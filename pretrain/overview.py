"""All commands on one page. Nothing heavy is imported here, so that it is there at once."""

from importlib.metadata import version

COMMANDS = {
    "shard": "slides → tile shards",
    "shards verify": "read shards whole, and find what is missing, damaged or not as the index says",
    "shards index": "index shards that another program wrote, or merge what a job array made",
    "inspect": "look at a slide's tissue mask and grid, or at the tiles of any source",
    "tile": "tile shards → tile encoder (DINOv2 and its relatives)",
    "tile replay": "a step that wasn't finite, again: which tile and which term did it; 'tile run=… replay=STEP' is the same",
    "embed": "tile shards or slides + tile encoder → tile embeddings; these + slide encoder → slide embeddings",
    "curate": "tile embeddings → which tiles to train on, balanced over clusters of what they show",
    "slide": "slide embeddings → slide encoder (masked autoencoder)",
    "probe": "encoder + labelled tiles → k-NN and linear accuracy beside their baselines",
    "probe slide": "slide encoder + labels of slides → is it of use; 'probe stage=slide' is the same",
    "export": "run → a folder that timm or Prov-GigaPath's code loads",
    "report": "run → one HTML page",
    "doctor": "is this machine, cluster and data ready for a run; what to do where it isn't",
    "doctor slide": "the same for a run of the slide stage",
    "doctor machine": "the same for commands that don't train",
    "plan": "settings of a run + machines → does it fit, how long, at what cost, what must be read",
    "recipes": "what can be reproduced, at what cost, and what is unknown about it",
    "demo": "the whole road on a small slide",
}


def said_at_once(arguments: list[str]) -> str | None:
    """What is printed for a command line that names no command: all of them; or that asks for the version. None for any
    other."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return overview()
    return f"slidewright {version('slidewright')}" if "--version" in arguments else None


def overview() -> str:
    """The text of ``pretrain --help``."""
    rows = "\n".join(f"  {name:<15} {summary}" for name, summary in COMMANDS.items())
    return f"""\
Slidewright: pretrain pathology foundation models from whole-slide images.

    slides ──shard──▶ tile shards ──tile──▶ tile encoder ──embed──▶ slide embeddings ──slide──▶ slide encoder
                                               └─ probe, export                          └─ export

usage: pretrain COMMAND [key=value …] [--help] [--cfg job] [--config-dir DIR] [--multirun]

{rows}

  pretrain tile --help             what a command does, and all its settings
  pretrain tile --cfg job          the whole resolved configuration, and where each value comes from
  pretrain tile recipe=… run=…     values come from configs/, a recipe overrides them, the command line overrides both
  pretrain tile --multirun …       a run for each of several values, optim.lr=1e-4,3e-4 or seed=range(0,3), below run=
  pretrain tile launch=slurm …     submits the command as a job, whichever it is; launch=torchrun restarts a training run that dies

Every command can be stopped at any moment; the same command continues, or says that it is done.
Start with 'pretrain demo'."""
