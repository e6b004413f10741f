"""Choose which tiles to train on, so that what is common doesn't crowd out what is rare.

Embeddings of tiles are clustered by k-means, the clusters' centres again, and so on (clusters=, the finest first), and
k-means is repeated on the tiles nearest to the centres, so that clusters lie evenly and not where most tiles are. size=
tiles are then drawn from the top down: clusters share equally, one that has fewer gives all it has, and inside each the
same again. See arXiv 2405.15613, and 2503.18709 for pathology.

out= becomes a folder with curated.parquet, a row for every tile: slide, x, y (level-0 pixels), tile_size_level0, row (of
its slide's embeddings), cluster_1, cluster_2 … and weight, how often it comes in a pass. 'pretrain tile' takes it as
data.sample=, for shards, slides read online, Parquet files with columns x and y, and mixtures or their members: tiles of
weight 0 never come, those of weight 3 three times a pass. Any table with slide, x, y and weight does, so yours may too. Slides
read online must be so at the size and µm/px that were embedded; a tile stands for the places around it there.

index.html shows the clusters' sizes before and after, each slide's share, and with shards= tiles of some clusters.

Embeddings stay on disk and are gone through by chunks. In memory are about ten times the finest centres (10,000 of width
1536: 0.6 GB) and half a GiB, and with resampling in the finest level 20 bytes for each tile that it is fitted on. Centres
are found among fit_tiles= tiles a cluster; then every tile is compared once with all finest centres, on a GPU where there is
one; on CPUs in two thirds of the time where faiss is installed (pip install faiss-cpu). processes= share the work: this command starts them on this machine, launch=torchrun and launch=slurm on several, and
the table is that of one process. Features that another program made become a store by 'pretrain embed features=…' first. Stopped at any moment, the same
command goes on with the level, or the quarter of a million of tiles, that it was at, on as many processes as you like.

Examples:

    pretrain curate embeddings=embeddings out=curated size=1000000
    pretrain curate embeddings=[tcga,gtex] out=curated size=5000000 clusters=[100000,10000,1000] shards=[tcga_shards]
    pretrain curate embeddings=embeddings out=curated size=20000 clusters=[400,40] resampling_steps=[5,10] fit_tiles=null
    pretrain curate embeddings=embeddings out=curated size=5000000 launch=slurm launch.nodes=4 launch.gpus_per_node=8
    pretrain tile run=runs/curated data.shards=shards data.sample=curated/curated.parquet
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

from data.fault import Fault
from data.files import PARTIAL, remove, require_writable
from data.lease import alone
from models.allowed import ON_DISK, SHARE, SOME, Agreements, numbers, one_of, within
from pretrain.run.counted import counted_as
from pretrain.run.progress import say


def check_clusters(clusters: list[int]) -> None:
    """Raise ValueError for levels that don't become fewer."""
    if any(above >= below for below, above in pairwise(clusters)):
        raise ValueError("each level has fewer clusters than the one before it, as [10000,1000,100]")


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/curate.yaml``."""

    embeddings: Annotated[list[str], SOME, ON_DISK]
    size: Annotated[int, within(least=1)]
    out: Annotated[str, ON_DISK]
    clusters: Annotated[list[int], SOME, within(least=1)]
    repeats: Annotated[int, within(least=1, most=1000)]
    distance: Annotated[str, one_of("euclidean", "cosine")]
    iterations: Annotated[int, within(least=1)]
    resampling_steps: Annotated[list[int], numbers(2), within(least=0)]
    nearest: Annotated[float, SHARE]
    fit_tiles: Annotated[int | None, within(least=1)]
    shards: Annotated[list[str] | None, SOME]
    shown: Annotated[int, within(least=0)]
    tiles: Annotated[int, within(least=1)]
    device: str | None
    processes: Annotated[int, within(least=1)]
    seed: Annotated[int, within(least=0)]

    agreements: ClassVar[Agreements] = {("clusters",): check_clusters}


def run(config: Config) -> None:
    """Curate what isn't curated yet, and write the page."""
    import torch

    from data.tiles.of_shards import ShardTiles
    from pretrain.curation.curating import TABLE, Wanted, curate, require_possible
    from pretrain.curation.page import require_embedded_tiles, write_curation_page
    from pretrain.curation.rows import open_stores
    from pretrain.encoders.frozen import device_of
    from pretrain.run.peers import met

    out = Path(config.out)
    if any(out.resolve() == Path(folder).resolve() for folder in config.embeddings):
        raise Fault(f"out={out} holds the embeddings themselves: give a folder of its own, out=curated say.")
    require_writable(out / TABLE)
    store = open_stores(config.embeddings)
    wanted = Wanted(**{field.name: getattr(config, field.name) for field in fields(Wanted)})
    require_possible(store, wanted)
    shown = ShardTiles(shards=config.shards) if config.shards is not None else None
    if shown is not None:
        require_embedded_tiles(store, shown)
    with met("processes", config.processes, config.device or "") as peers:
        device = device_of(peers.device)
        torch.set_float32_matmul_precision("highest")  # distances are small differences of large products
        with alone(out, doing="another 'pretrain curate'") if peers.first else nullcontext():
            for left in out.glob(f".*{PARTIAL}") if peers.first else ():  # by one that was killed
                remove(left)
            facts = curate(out, store, wanted, device, peers)
            if facts is None:
                return
            write_curation_page(out, facts, shown)
    for number, level in enumerate(facts["levels"], 1):
        before, after = level["effective"]
        clusters = counted_as(level["clusters"], "cluster")
        say(f"level {number}: {clusters}, as even as {before:,.1f} before and {after:,.1f} after")
    say(f"look at {out / 'index.html'}; train on them with data.sample={out / TABLE}")
    said = {name: facts[name] for name in ("tiles", "taken", "slides", "slides_taken")}
    print(json.dumps({"out": config.out} | said), flush=True)
