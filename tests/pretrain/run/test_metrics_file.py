"""metrics.jsonl at a million steps: rewound wherever later steps stand, read by its tail, thinned while it is read."""

import json
import tracemalloc
from pathlib import Path

import pytest

from pretrain.run import metrics as metrics_file


def write(run: Path, steps: int, ending: str = "") -> list[str]:
    lines = []
    for step in range(1, steps + 1):
        lines.append(json.dumps({"step": step, "loss": 1 / step, "lr": 0.1, "note": "x" * (step % 50)}))
        if step % 100 == 0:
            lines.append(json.dumps({"step": step, "rankme": float(step)}))
        if step == 77:
            lines.append(json.dumps({"step": step, "alarm": "slow", "since": 3, "says": "it is slow"}))
            lines.append(json.dumps({"step": step, "loss": None}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n" + ending)
    return lines


@pytest.mark.parametrize("block", [7, 64, 2**20])
@pytest.mark.parametrize("step", [0, 1, 76, 77, 100, 249, 250, 300])
@pytest.mark.parametrize("ending", ["", '{"step": 251, "lo'])
def test_rewinding_keeps_the_bytes_up_to_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, step: int, ending: str
) -> None:
    monkeypatch.setattr(metrics_file, "BYTES_A_READ", block)
    lines = write(tmp_path, 250, ending)
    metrics_file.rewind(tmp_path, step)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(line + "\n" for line in kept)


def test_rewinding_takes_out_later_steps_wherever_they_stand(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 9, 2, 3, 8, 7, 3)]
    for ending in ("\n", '\n{"step": 2, "lo', "\nnothing\n"):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + ending)
        metrics_file.rewind(tmp_path, 3)
        assert [line["step"] for line in metrics_file.read_metrics(tmp_path)] == [1, 2, 3, 3]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_tail_is_the_last_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write(tmp_path, 300)
    assert metrics_file.tail(tmp_path) == [json.loads(line) for line in lines]
    monkeypatch.setattr(metrics_file, "TAIL", 500)
    found = metrics_file.tail(tmp_path)
    assert 3 < len(found) < 20 and found == [json.loads(line) for line in lines[-len(found) :]]
    assert metrics_file.tail(tmp_path / "nothing") == []


def test_thinning_keeps_all_that_is_rare_the_last_step_and_a_sample_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "SHOWN", 100)
    lines = [json.loads(line) for line in write(tmp_path, 3000)]
    found = metrics_file.thinned(tmp_path)
    rare = [line for line in lines if line.get("loss") is None]
    assert [line for line in found if line.get("loss") is None] == rare
    ordinary = [line["step"] for line in found if line.get("loss") is not None]
    assert 50 < len(ordinary) < 200 and ordinary[0] == 1 and ordinary[-1] == 3000
    assert ordinary == sorted(set(ordinary))
    monkeypatch.setattr(metrics_file, "SHOWN", 10**6)
    assert metrics_file.thinned(tmp_path) == lines


def test_what_a_resumed_run_reads_does_not_grow_with_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "TAIL", 2**14)
    monkeypatch.setattr(metrics_file, "BYTES_A_READ", 2**14)
    peaks = []
    for steps in (1000, 20_000):
        write(tmp_path, steps)
        tracemalloc.start()
        metrics_file.tail(tmp_path)
        metrics_file.rewind(tmp_path, steps - 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
