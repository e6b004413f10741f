"""Turn slides into sequences of tile embeddings, and these into slide embeddings.

stage=tile (the default): every tile of every slide goes through a frozen tile encoder. out= becomes a store with one
float16 matrix per slide, tiles in row-major order, which 'pretrain slide' trains on. Tiles come from shards, or
straight from the slides. A store belongs to one encoder: another one's embeddings are refused.

stage=slide: every slide of such a store goes through a slide encoder. out= becomes a folder with slides.parquet, one row
per slide: its vectors by pooling (pooled, mean_std, cluster_means, cluster_moments, pooled_layers, cls, cls_layers),
the one that pooling= chooses once more as vector, and mean_tiles, the baseline that needs no slide encoder. Clusters of
tiles are found once and kept in out=; another folder takes them over with clusters=. random=true gives the network
random weights. The work on a long slide is shared by several processes, processes_per_slide=, which this command starts,
or torchrun; each holds all of its tiles.

per_tile=true makes out= a store instead, as stage=tile does, of what the slide encoder makes of each tile. maps= makes it
a folder of maps, of how much each tile counted for its slide's vector: Parquet (slide, x, y, score), h5, GeoJSON for
QuPath, and a heat map, over the slide's thumbnail where slides= has its file. maps=rollout follows attention back from
the mean of the tiles, or the class token where pooling= is of that; 1 is an even share. maps=gradient is gradient × input
of the vector that pooling= names, along its own direction or that of a linear model's weights (direction=weights.npy,
with the clusters beside it), and maps=sensitivity its size. What decides a label is asked with such weights: attention,
and a vector's own direction, know nothing of it.

Stopped at any moment, the same command goes on with the first slide that isn't whole. A slide that can't be read is
named and left out, the others go on, and the command ends with an error; run again, it is retried. The last line of
output is JSON.

Examples:

    pretrain embed checkpoint=runs/tile shards=shards out=embeddings
    pretrain embed checkpoint=encoder slides=/slides out=embeddings mpp=0.5 export=trident batch=256
    pretrain embed checkpoint=encoder slides=/slides out=embeddings part=3/40      # a task of a job array …
    pretrain embed out=embeddings merge=true                                       # … and when all are done
    pretrain embed features=trident/features_uni_v1 encoder=uni_v1 out=embeddings
    pretrain embed stage=slide checkpoint=runs/slide embeddings=embeddings out=slide_embeddings
    pretrain embed stage=slide checkpoint=runs/slide embeddings=others out=more patients=labels.csv clusters=slide_embeddings
    pretrain embed stage=slide checkpoint=runs/slide embeddings=embeddings out=random_embeddings random=true
    pretrain embed stage=slide checkpoint=runs/slide embeddings=huge_slides out=huge processes_per_slide=8
    pretrain embed stage=slide checkpoint=runs/slide embeddings=embeddings out=in_context per_tile=true
    pretrain embed stage=slide checkpoint=runs/slide embeddings=embeddings out=maps maps=rollout slides=/slides
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data.embeddings.feature_files import UNITS, list_features
from data.embeddings.h5 import EXPORTS
from data.embeddings.index import merge_job_indexes
from data.embeddings.slide_features import (
    ABOUT,
    MAPS,
    POOLINGS,
    gather_pieces,
    require_parts_finished,
    slide_store_facts,
    slides_in,
)
from data.embeddings.slide_tables import patients_of
from data.embeddings.sources import EmbeddingSource, ShardSource, slides_of_part
from data.embeddings.store import EmbeddingStore, EmbeddingWriter
from data.fault import Fault
from data.shards.job_array import JobPart
from data.slides.lists import list_slides
from data.slides.mpp import ISOTROPIC, SlidesMpp
from data.slides.tiling import TilingSettings
from models.allowed import ON_DISK, SHARE, SOME, TILE, one_of, within
from pretrain.embedding.named_slides import hold_to_embedded_mpp, named_slides
from pretrain.embedding.result import require_none_left_out, say_embedded, write_exports
from pretrain.embedding.shared_slides import share_every_slide
from pretrain.encoders.slide_encoders import SlideEncoder, load_slide_encoder
from pretrain.run.peers import Peers, met
from pretrain.run.progress import say
from pretrain.settings.composition import of_the_command_line
from pretrain.settings.tissue_rules import RULES, chosen_rules

USED_BY = {
    "slides=": {"slides", "checkpoint", "slides_mpp", "min_tissue", "min_saturated"},
    "shards=": {"shards", "checkpoint"},
    "features=": {"features", "slides", "slides_mpp", "encoder", "features_tile", "features_unit", "features_mpp"},
    "stage=slide": {"embeddings", "checkpoint", "random", "patients", "clusters"},
    "per_tile=true": {"embeddings", "checkpoint", "random", "per_tile"},
    "maps=": {"embeddings", "checkpoint", "random", "maps", "slides", "direction", "clusters"},
}  # of the settings that have no value unless they are given, those that count
WORK = {
    "slides=": "cuts tiles from slides",
    "shards=": "has the tiles that were cut",
    "features=": "takes over what another program embedded",
    "stage=slide": "embeds whole slides from their tiles' embeddings",
    "per_tile=true": "embeds tiles as the slide encoder sees them among the others",
    "maps=": "shows which tiles a slide's vector looked at",
}


@dataclass
class Config:
    """Types of the settings; values and explanations are in ``configs/embed.yaml``."""

    stage: Annotated[str, one_of("tile", "slide")]
    out: Annotated[str, ON_DISK]
    slides: Annotated[list[str] | None, ON_DISK]
    shards: list[str] | None
    features: Annotated[str | None, ON_DISK]
    embeddings: Annotated[str | None, ON_DISK]
    checkpoint: Annotated[str | None, ON_DISK]
    device: str | None
    precision: Annotated[str, one_of("float32", "bfloat16")]
    batch: Annotated[int, within(least=1)]
    tokens: Annotated[int, within(least=1)]
    pooling: Annotated[str, one_of(*POOLINGS)]
    patients: Annotated[str | None, ON_DISK]
    clusters: Annotated[str | None, ON_DISK]
    random: bool
    seed: Annotated[int, within(least=0)]
    processes_per_slide: Annotated[int, within(least=1)]
    per_tile: bool
    maps: Annotated[str | None, one_of("rollout", "gradient", "sensitivity")]
    direction: Annotated[str | None, ON_DISK]
    threads: Annotated[int, within(least=1)]
    max_bad_fraction: Annotated[float, SHARE]
    part: str | None
    merge: bool
    export: Annotated[list[str], one_of(*EXPORTS)]
    mpp: Annotated[float, within(above=0)]
    tile_size: Annotated[int, TILE]
    tissue: Annotated[list[Any], SOME, RULES]
    min_tissue: Annotated[list[float] | None, SHARE]
    min_saturated: Annotated[float | None, SHARE]
    slides_mpp: str | None
    encoder: str | None
    features_tile: Annotated[float | None, within(above=0)]
    features_mpp: Annotated[float | None, within(above=0)]
    features_unit: Annotated[str | None, one_of(*UNITS)]
    allow_plugins: list[str]


def run(config: Config) -> None:
    """Embed what isn't embedded yet. Raises Fault where a slide was left out, at the end."""
    job = JobPart.parse(config.part) if config.part else None
    part, parts = (job.number, job.of) if job else (0, 1)
    require_consistent(config)
    if config.merge and (Path(config.out) / ABOUT).exists():
        _gather(config)
    elif config.merge and (Path(config.out) / MAPS).exists():
        say(f"{config.out} holds maps, which need no merging: every slide has files of its own")
        slides = len(list((Path(config.out) / "parquet").glob("*.parquet")))
        print(json.dumps({"out": config.out, "slides": slides}), flush=True)
    elif config.merge:
        merge_job_indexes(Path(config.out))
        say_embedded(config.out, EmbeddingStore.open(Path(config.out)), {}, None, time.monotonic(), {})
    elif config.stage == "slide":
        with met("processes_per_slide", config.processes_per_slide, config.device or "") as peers:
            _embed_slides_whole(config, peers, part, parts)
    elif config.features:
        _import_features(config, part, parts)
    else:
        _embed_tiles(config, part, parts)


@of_the_command_line()
def require_consistent(config: Config) -> None:
    """Raise Fault for settings that don't fit together, saying which to give."""
    if config.processes_per_slide > 1 and (config.stage != "slide" or config.merge or config.per_tile or config.maps):
        raise Fault("processes_per_slide= is for slides' vectors: stage=slide, without merge=, per_tile= and maps=.")
    if config.merge:
        return
    if config.stage == "slide":
        if not config.embeddings or not config.checkpoint:
            raise Fault("stage=slide needs checkpoint=, a slide run, and embeddings=, a store of tile embeddings.")
        if config.per_tile and config.maps:
            raise Fault("per_tile=true and maps= make folders of their own: leave one of them out.")
        if config.direction and not config.maps:
            raise Fault("direction= is for maps=gradient and maps=sensitivity: give one of them, or leave it out.")
        refuse_idle(config, "maps=" if config.maps else "per_tile=true" if config.per_tile else "stage=slide")
        if config.export and not config.per_tile:
            raise Fault("export= writes embeddings of tiles: with stage=slide it goes with per_tile=true.")
        if config.direction and config.maps == "rollout":
            raise Fault("direction= is for maps=gradient and maps=sensitivity: a rollout has none; leave it out.")
        if config.part and config.patients:
            raise Fault("patients= is written when the parts are put together: give it with merge=true.")
        return
    if config.embeddings:
        raise Fault("embeddings= is for stage=slide; to embed tiles, give slides= or shards=.")
    if not config.slides and not config.shards and not config.features:
        raise Fault("say what to embed: slides=… or shards=… ('pretrain embed --help' explains).")
    if config.slides and config.shards and not config.features:
        raise Fault("give slides= or shards=, not both: the shards hold the slides' tiles already.")
    refuse_idle(config, "features=" if config.features else "shards=" if config.shards else "slides=")
    if not config.features and not config.checkpoint:
        raise Fault("say by what to embed: checkpoint=… is a tile run, an exported folder or the name of a timm model.")


def refuse_idle(config: Config, work: str) -> None:
    """Raise Fault for settings that are given and have no effect in this work, one of `USED_BY`."""
    idle = [
        f"{name}="
        for name in sorted({name for names in USED_BY.values() for name in names} - USED_BY[work])
        if getattr(config, name)
    ]
    if idle:
        have = "has" if len(idle) == 1 else "have"
        what = WORK[work]
        raise Fault(
            f"{work} {what}, and {' and '.join(idle)} {have} no effect there: leave"
            f" {'it' if len(idle) == 1 else 'them'} out, or {work}."
        )


def _embed_tiles(config: Config, part: int, parts: int) -> None:
    """stage=tile, by an encoder."""
    from pretrain.embedding.tiles import embed_slides
    from pretrain.encoders.loading import load_encoder
    from pretrain.encoders.tiles_seen import tiles_seen, unlike_those_seen

    assert config.checkpoint is not None
    began, out = time.monotonic(), Path(config.out)
    shards = ShardSource(config.shards) if config.shards else None
    encoder = load_encoder(config.checkpoint, config.device or "", config.precision, config.allow_plugins)
    with EmbeddingWriter(out, encoder.width, encoder.name, encoder.hash, part, parts) as writer:
        source: EmbeddingSource = shards or named_slides(
            config.slides or [], _tiling(config), SlidesMpp.parse(config.slides_mpp), writer
        )
        mine = slides_of_part(source, part, parts) if part else source.slides
        pending = [slide for slide in mine if not writer.done(slide)]
        failed: dict[str, str] = {}
        if pending:
            say(f"{encoder.name} ({encoder.hash}): {encoder.preprocessing}")
            side = shards.tile_side() if shards else config.mpp * config.tile_size
            seen = tiles_seen(Path(place) for place in (config.checkpoint, encoder.source))
            if side and (unlike := unlike_those_seen(seen, side)):
                say(f"{unlike}; mpp= and tile_size= say what is cut")
            failed = embed_slides(
                encoder.start,
                source,
                pending,
                writer,
                batch=config.batch,
                threads=config.threads,
                max_bad_fraction=config.max_bad_fraction,
                pin=encoder.device.type == "cuda",
                done=len(mine) - len(pending),
            )
        writer.finish(failed)
    store = EmbeddingStore.open(out)
    write_exports(config.export, out, store, [slide for slide in mine if slide not in failed])
    say_embedded(config.out, store, failed, len(pending) - len(failed), began, {})


def _tiling(config: Config) -> TilingSettings:
    rules = chosen_rules(config.tissue, config.min_tissue)
    return TilingSettings(config.mpp, config.tile_size, rules, config.min_saturated)


def _import_features(config: Config, part: int, parts: int) -> None:
    """stage=tile, of features that are there already. Where they don't carry a hash of their encoder, its name stands
    for it."""
    from pretrain.embedding import features

    assert config.features is not None
    began, out = time.monotonic(), Path(config.out)
    files = list_features(Path(config.features))
    (stated, hash_), dimensions = features.made_by(files, config.encoder)
    name = config.encoder or stated
    if name is None:
        raise Fault(f"the files in {config.features} don't say which encoder made them: give its name, encoder=….")
    mine = sorted(files)[part - 1 :: parts] if part else sorted(files)
    with EmbeddingWriter(out, dimensions, name, features.hash_of(name, hash_), part, parts) as writer:
        files, mine = features.under_kept_names(files, mine, writer)
        pending = [slide for slide in mine if not writer.done(slide)]
        slides = {path.stem: path for path in list_slides(config.slides or [])}
        slides_mpp = SlidesMpp.parse(config.slides_mpp)
        done = {slides.get(files[slide].stem, files[slide]): slide for slide in mine if writer.done(slide)}
        hold_to_embedded_mpp(writer, done, slides_mpp, ISOTROPIC)
        results, failed = features.add_slides(
            files,
            pending,
            writer,
            slides=slides,
            slides_mpp=slides_mpp,
            tile_size_level0=config.features_tile,
            mpp=config.features_mpp,
            unit=config.features_unit,
            encoder=config.encoder,
            max_bad_fraction=config.max_bad_fraction,
        )
        writer.finish(failed)
    store = EmbeddingStore.open(out)
    write_exports(config.export, out, store, [slide for slide in mine if slide not in failed])
    say_embedded(config.out, store, failed, len(pending) - len(failed), began, {"results": results})


def _embed_slides_whole(config: Config, peers: Peers, part: int, parts: int) -> None:
    """stage=slide: by vectors, tile by tile, or as maps."""
    from pretrain.embedding.contextualised import embed_tiles_in_context
    from pretrain.embedding.random_weights import random_encoder
    from pretrain.embedding.slides import embed_store

    assert config.checkpoint is not None and config.embeddings is not None
    began = time.monotonic()
    store, out = EmbeddingStore.open(Path(config.embeddings)), Path(config.out)
    encoder = load_slide_encoder(config.checkpoint, peers.device, config.allow_plugins)
    if config.random:
        encoder = random_encoder(encoder, config.seed)
    for sentence in encoder.notes:
        say(f"{encoder.name}: {sentence}")
    if config.maps:
        _map(config, store, encoder, part, parts)
        return
    if config.per_tile:
        new = embed_tiles_in_context(
            store, encoder, out, part=part, parts=parts, tokens=config.tokens, precision=config.precision
        )
        made = EmbeddingStore.open(out)
        write_exports(config.export, out, made, made.slides[part - 1 :: parts] if part else made.slides)
        say_embedded(config.out, made, {}, new, began, {"tile_encoder_hash": store.encoder_hash})
        return
    share_every_slide(encoder, peers.group)
    patients = patients_of(Path(config.patients) if config.patients else None, store.slides)
    new = embed_store(
        store,
        encoder,
        out,
        peers,
        part=part,
        parts=parts,
        tokens=config.tokens,
        precision=config.precision,
        pooling=config.pooling,
        clusters=Path(config.clusters) if config.clusters else None,
        seed=config.seed,
    )
    if not peers.first:
        return
    slides = len(slides_in(out)) if part else gather_pieces(out, patients)
    why = "their patients are as patients= says" if config.patients else "nothing to do"
    say(f"{out}: {slides} slides" + ("" if new else f"; all were there already, {why}"))
    facts = {
        "out": config.out,
        "slides": slides,
        "width": encoder.network.width,
        "encoder": encoder.name,
        "encoder_hash": encoder.hash,
        "tile_encoder_hash": store.encoder_hash,
        "pooling": config.pooling,
        "new_slides": new,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(facts), flush=True)


def _map(config: Config, store: EmbeddingStore, encoder: SlideEncoder, part: int, parts: int) -> None:
    """stage=slide maps=…."""
    from pretrain.slide_maps.mapping import map_store

    assert config.maps is not None
    began = time.monotonic()
    new, failed = map_store(
        store,
        encoder,
        Path(config.out),
        way=config.maps,
        pooling=config.pooling,
        direction=Path(config.direction) if config.direction else None,
        clusters=Path(config.clusters) if config.clusters else None,
        seed=config.seed,
        slides=config.slides or [],
        part=part,
        parts=parts,
        tokens=config.tokens,
    )
    say(f"{config.out}: {new} slides mapped" + ("" if new or failed else "; all were there already, nothing to do"))
    facts = {
        "out": config.out,
        "maps": config.maps,
        "pooling": config.pooling,
        "encoder": encoder.name,
        "encoder_hash": encoder.hash,
        "new_slides": new,
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(facts), flush=True)
    require_none_left_out(failed)


def _gather(config: Config) -> None:
    """stage=slide merge=true: the parts' rows become one file."""
    out = Path(config.out)
    about = slide_store_facts(out)
    require_parts_finished(out)
    slides = gather_pieces(out, patients_of(Path(config.patients) if config.patients else None, slides_in(out)))
    say(f"{out}: {slides} slides")
    hashed = {"encoder_hash": about["encoder_hash"].partition(" ")[0]}  # without what else its slides depend on
    print(json.dumps({"out": config.out, "slides": slides} | about | hashed), flush=True)
