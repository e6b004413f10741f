"""DINOv2's CosineScheduler."""

import json
from pathlib import Path

from pretrain.objectives.schedules import cosine


def test_every_schedule_equals_the_reference(goldens: Path) -> None:
    golden = json.loads((goldens / "dinov2_schedules.json").read_text())
    assert golden
    for name, schedule in golden.items():
        arguments, every = schedule["args"], int(schedule["at"].removeprefix("every ").partition("th")[0])
        for i, expected in enumerate(schedule["values"]):
            found = cosine(
                i * every,
                peak=arguments["base_value"],
                final=arguments["final_value"],
                total=arguments["total_iters"],
                warmup=arguments.get("warmup_iters", 0),
                start=arguments.get("start_warmup_value", 0.0),
                frozen=arguments.get("freeze_iters", 0),
            )
            assert abs(found - expected) <= 1e-9, f"{name} at step {i * every}"
