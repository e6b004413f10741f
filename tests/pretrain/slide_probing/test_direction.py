"""A probe's linear model is what maps are asked by: its weights and clusters go from one command to the other."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.embeddings.store import EmbeddingStore
from launch.entry import run_command_line
from pretrain.slide_probing import judge
from tests.pretrain.slide_probing.labelled_slides import copy_slides, write_labelled_slides
from tests.pretrain.training.test_slide_training import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_probe_s_weights_tell_its_labels_and_make_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "RESAMPLES", 20)
    labels = write_labelled_slides(tmp_path / "store", 12)
    lines = [f"{slide},{'ab'[label]}" for slide, label in labels]
    (tmp_path / "labels.csv").write_text("slide,label\n" + "\n".join(lines))
    words = ["optim.steps=2", "optim.warmup_steps=1", "trainer.accelerator=cpu", "data.validation_fraction=0", *SMALL]
    run_command_line(["slide", f"run={tmp_path / 'run'}", f"data.embeddings={tmp_path / 'store'}", *words])
    made = tmp_path / "direction"
    asked = [f"store={tmp_path / 'store'}", f"checkpoint={tmp_path / 'run'}", f"direction={made}", "device=cpu"]
    few = ["folds=2", "repeats=1", "attention=false"]
    run_command_line(["probe", "stage=slide", f"labels={tmp_path / 'labels.csv'}", *asked, *few])
    weights = np.load(made / "weights.npy")
    embedded = ["embed", "stage=slide", f"embeddings={tmp_path / 'store'}", asked[1], "device=cpu", f"clusters={made}"]
    run_command_line([*embedded, f"out={tmp_path / 'vectors'}"])
    table = pq.read_table(tmp_path / "vectors" / "slides.parquet").to_pydict()
    logits = dict(zip(table["slide"], np.stack(table["cluster_moments"]) @ weights, strict=True))
    by_label = [[logits[slide] for slide, label in labels if label == wanted] for wanted in (0, 1)]
    assert max(by_label[0]) < min(by_label[1])  # fitted on these

    run_command_line([*embedded, f"out={tmp_path / 'maps'}", "maps=sensitivity", f"direction={made / 'weights.npy'}"])
    assert len(list((tmp_path / "maps").rglob("*.parquet"))) >= 12
    # Of another store, the direction's own clusters are taken, though nobody names them.
    copy_slides(EmbeddingStore.open(tmp_path / "store"), [slide for slide, _ in labels[:5]], tmp_path / "others")
    other = ["embed", "stage=slide", f"embeddings={tmp_path / 'others'}", asked[1], "device=cpu", "maps=sensitivity"]
    weights_file = f"direction={made / 'weights.npy'}"
    run_command_line([*other, f"out={tmp_path / 'of_others'}", weights_file])
    kept, centres = (
        json.loads((folder / "clusters.json").read_text())["centres"] for folder in (tmp_path / "of_others", made)
    )
    assert kept == centres
    moved = tmp_path / "moved.npy"
    moved.write_bytes((made / "weights.npy").read_bytes())
    about = json.loads((made / "clusters.json").read_text())
    (tmp_path / "others.json").write_text(json.dumps(about | {"centres": centres[::-1]}))
    capsys.readouterr()
    for words, said in (
        ([f"direction={moved}"], "none lie beside it: give the folder of those slide embeddings, clusters="),
        ([weights_file, f"clusters={tmp_path / 'others.json'}"], "are others than those of direction="),
    ):
        with pytest.raises(SystemExit):
            run_command_line([*other, f"out={tmp_path / 'refused'}", *words])
        assert said in capsys.readouterr().err and not (tmp_path / "refused").exists()
    (tmp_path / "labels.csv").write_text(
        "slide,label\n" + "\n".join(f"{s},{'abc'[i % 3]}" for i, (s, _) in enumerate(labels))
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_command_line(["probe", "stage=slide", f"labels={tmp_path / 'labels.csv'}", *asked, *few])
    assert "direction= is of one output, and a model of 3 classes has as many" in capsys.readouterr().err
