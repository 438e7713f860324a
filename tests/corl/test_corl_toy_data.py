"""`corl.py --data X` without a model: the tiny model's settings, and data that it could not learn from."""

from __future__ import annotations

from pathlib import Path

import warm
from made import cache_folder

SCRIPT = str(warm.ROOT / "recipes" / "corl.py")
OWN = '{"prompt": "a red square beside a house", "real_image": "a.png"}\n'


def test_own_data_without_a_model(tmp_path: Path) -> None:
    """Nothing is downloaded and no base is made: the settings are corl_tiny.yaml's, and a line says what is missing."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(OWN * 16)
    running = warm.Program(
        SCRIPT, "--data", "rows.jsonl", "--output_dir", "run", env=warm.environment(cache_folder()), cwd=tmp_path
    )
    out, said = running.communicate(timeout=120)
    assert "no --model: the tiny one, and recipes/corl_tiny.yaml" in out
    assert running.poll() == 2 and len(said.splitlines()) == 1 and "model" in said, said
    assert not (tmp_path / "run" / "unified").exists()
