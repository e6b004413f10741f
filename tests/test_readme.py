"""Every command that the README and the folders' guides show runs, in the order in which it is shown; links and paths are
there."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pretrain.commands.recipes import describe_recipe

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [
    "README.md",
    *(f"{folder}/README.md" for folder in ("data", "configs", "models", "launch", "pretrain", "tests", "tests/bench")),
]
TUTORIAL = "pretrain/TUTORIAL.md"
TEXTS = {name: (ROOT / name).read_text() for name in (*GUIDES, TUTORIAL, "CONTRIBUTING.md")}
SLIDE = Path(sys.prefix) / "share" / "slidewright" / "CMU-1-Small-Region.svs"
# Training as shown takes minutes; here it takes two steps, of fewer tiles. Nothing else is changed.
FEWER = ["optim.steps=2", "optim.warmup_steps=1"]
SHORTER = {"tile": [*FEWER, "data.batch_size=16"], "slide": FEWER, "doctor": FEWER}


def shown(texts: Iterable[str]) -> list[str]:
    """The lines of their bash blocks."""
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S)]
    return [line for block in blocks for line in block.splitlines()]


def test_every_line_of_the_bash_blocks_is_a_command_that_is_tested() -> None:
    assert [line for line in shown(TEXTS.values()) if not line.startswith(("#", "pretrain ", "make "))] == []
    assert len(shown([TEXTS["README.md"]])) > 12


@pytest.fixture
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``slides/`` (three copies of a real one) and ``labelled/{train,test}/`` (two classes of made-up
    tiles)."""
    if not SLIDE.exists():
        pytest.skip(f"the real slide is not at {SLIDE}: 'make setup' brings it")
    folder = tmp_path_factory.mktemp("readme")
    (folder / "slides").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(SLIDE, folder / "slides" / f"{name}.svs")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind, level in (("light", 200), ("dark", 90)):
            (folder / "labelled" / split / kind).mkdir(parents=True)
            for i in range(6):
                pixels = draw.normal(level, 30, (96, 96, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "labelled" / split / kind / f"{i}.png")
    return folder


def run_as_shown(texts: Iterable[str], workplace: Path) -> None:
    """Run every ``pretrain`` line of the texts, in their order."""
    lines = []
    for line in shown(texts):
        program, *words = shlex.split(line, comments=True) or [""]
        if program != "pretrain":
            continue
        runs = "--cfg" not in words and not any(word.startswith(("launch=", "replay=")) for word in words)
        batch = ["data.batch_size=16"] if words[0] == "doctor" and words[1] != "slide" else []
        lines.append(words + (SHORTER.get(words[0], []) + batch if runs else []))
    driver = (
        "import json, os, sys\n"
        "from launch.entry import run_command_line\n"
        "if __name__ == '__main__':\n"
        "    for words in json.loads(sys.argv[1]):\n"
        "        print('$ pretrain', *words, flush=True)\n"
        "        if '--multirun' in words:\n"  # its runs are processes: what a run made here left behind is not theirs
        "            [os.environ.pop(name, None) for name in ('MASTER_ADDR', 'MASTER_PORT')]\n"
        "        run_command_line(words)\n"
    )
    (workplace / "driver.py").write_text(driver)
    # Two processes are started by running the whole program again, so those commands go alone; and a plan makes a
    # process group, of which a training in its process would leave one behind.
    apart = [
        words for words in lines if words[0] == "plan" or any(word.startswith("trainer.devices=") for word in words)
    ]
    single = [words for words in lines if words not in apart]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(workplace), "OMP_NUM_THREADS": "1"}
    for group in (single, apart):
        done = subprocess.run(
            [sys.executable, "driver.py", json.dumps(group)],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def all_there(workplace: Path, *made: str) -> bool:
    return all((workplace / path).exists() for path in made)


def test_every_command_of_the_readme_runs_as_shown(workplace: Path) -> None:
    run_as_shown([TEXTS["README.md"]], workplace)
    tiles = ("shards/index.npz", "runs/tile/probe.json", "encoder/model.safetensors")
    assert all_there(workplace, *tiles, "embeddings/store.json", "runs/slide/config.yaml")


@pytest.mark.slow
def test_every_command_of_the_guides_runs_as_shown_behind_the_readmes(workplace: Path) -> None:
    run_as_shown((text for name, text in TEXTS.items() if name != TUTORIAL), workplace)
    pages = ("inspect/index.html", "inspect_slide/index.html", "runs/tile/report.html")
    stores = ("embeddings_of_export/trident", "embeddings_of_slides/index.parquet", "slide_embeddings/slide_store.json")
    assert all_there(workplace, *pages, *stores, "slide_encoder/slide_encoder.pth")


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs_as_shown_on_tiles_of_the_same_shape(workplace: Path) -> None:
    draw = np.random.default_rng(0)
    (workplace / "tiles").mkdir()
    for number in range(2):
        rows = []
        for i in range(128):
            encoded = io.BytesIO()
            pixels = draw.normal((200, 120, 170), 40, (224, 224, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(encoded, format="JPEG")
            patient = f"TCGA-A{number}-{i // 2:04d}"
            rows.append({"path": f"{patient}-01Z-00-DX1/{i}.jpg", "jpeg": encoded.getvalue()})
        file = workplace / "tiles" / f"shard-{number:05d}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=64)
    shutil.copy(SLIDE, workplace / "slides" / "d.svs")
    (workplace / "labels.csv").write_text("slide,label\na,benign\nb,benign\nc,tumour\nd,tumour\n")
    run_as_shown([TEXTS[TUTORIAL]], workplace)
    assert all_there(workplace, "look/index.html", "runs/laptop/report.html", "runs/try/config.yaml")
    assert all_there(workplace, "laptop_encoder/model.safetensors", "laptop_slides.json", "laptop_slides.html")


def test_the_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", "".join(TEXTS[name] for name in GUIDES)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("name", TEXTS)
def test_the_files_pictures_and_links_named_exist(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[name])
    for path in links:
        assert ((ROOT / name).parent / path).exists(), path
    for path in re.findall(r"`((?:data|models|pretrain|launch|configs|tests)/[\w/]+(?:\.py|\.yaml|/))`", TEXTS[name]):
        assert (ROOT / path).exists(), path


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 130


@pytest.mark.parametrize("name", TEXTS)
def test_no_paragraph_is_a_wall(name: str) -> None:
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.S)
    paragraphs = [part.strip("\n").splitlines() for part in re.split(r"\n\n|\n(?=- )", prose)]
    walls = [lines[0] for lines in paragraphs if len(lines) > 5 and not lines[0].startswith(("|", "    "))]
    assert walls == []


def test_the_readmes_recipes_are_as_their_files_say() -> None:
    for name, *cells in re.findall(
        r"^\| [^|]+ \| `(\w+)` \| ([\d,]+) M \| ([^|]+) \| ([\d,]+) × ([\d,]+) \| (\d+) \|$",
        TEXTS["README.md"],
        flags=re.M,
    ):
        told = describe_recipe(name)
        kept = [f"{told.parameters / 1e6:,.0f}", told.objective, f"{told.batch:,}", f"{told.steps:,}"]
        assert cells == [*kept, str(len(told.unknown))], name
