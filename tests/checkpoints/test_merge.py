"""merge.py and recipes/merge.py: the formulas to the last digit, in pieces, and nothing half written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncr1.engine.checkpoints import merge
from syncr1.engine.checkpoints.merge import RECORD, MergeReport, Moments, merge_checkpoints
from syncr1.engine.errors import CheckpointError, ConfigError
from syncr1.engine.policies.kinds import SAFE, SAFE_INDEX

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]
METHODS = ("gaussian", "fnorm", "mean")
SHAPES = [(), (0,), (1,), (2,), (9,), (4, 5), (3, 0), (2, 3, 3, 3), (17, 13)]
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "vocab.txt", "LICENSE"),
    *("chat_template.jinja", "tokenizer.model", "additional_chat_templates/tool.jinja"),
)
LEFT = ("README.md", "modeling_own.py", "pytorch_model.bin", "training_args.bin", "trainer_state.json", "optimizer.pt")
"""Of the first model's folder: what goes into a merge, and what does not."""
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def save(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True)
    save_file({name: value.clone() for name, value in state.items()}, folder / SAFE, metadata={"format": "pt"})
    return folder


def merged(
    root: Path, base: State, models: Sequence[State], method: str, *, piece: int = 7, width: float = 2.0
) -> tuple[State, MergeReport]:
    """Through folders, in pieces of a few elements."""
    where = root / f"merge-{len(list(root.iterdir()))}"
    folders = [save(where / f"in-{i}", state) for i, state in enumerate([base, *models])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "PIECE", piece)
        report = merge_checkpoints(folders[0], folders[1:], where / "out", method, width)  # type: ignore[arg-type]
    return load_file(where / "out" / SAFE), report


def by_formula(method: str, base: Tensor, models: Sequence[Tensor], width: float = 2.0) -> Tensor:
    """The formulas on whole tensors, in the precision of the arguments."""
    deltas = [model - base for model in models]
    if method == "mean":
        return base + sum(deltas) / len(deltas)
    if method == "fnorm":
        scales = [1 / delta.norm() for delta in deltas]
        return base + sum(s * d for s, d in zip(scales, deltas, strict=True)) / sum(scales)
    centre = sum(delta.mean() for delta in deltas) / len(deltas)
    sigma = torch.stack([delta.std() for delta in deltas]).min()
    inside = [(delta - centre).abs() < width * sigma for delta in deltas]
    both = [delta * ~i + delta * i / len(deltas) for delta, i in zip(deltas, inside, strict=True)]
    return base + sum(both)


def trained(base: Tensor, seed: int) -> Tensor:
    """A base that moved a little everywhere and much in some places."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
    move = 0.03 + 0.1 * noise * (1 + 4 * (torch.rand(base.shape, generator=generator) > 0.9))
    return (base.double() + move).to(base.dtype)


def start(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cases(draw_shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, num_models: int) -> tuple[State, list[State]]:
    base = {f"t{i}": start(shape, dtype, i) for i, shape in enumerate(draw_shapes)}
    models = [
        {name: trained(value, 100 * m + i) for i, (name, value) in enumerate(base.items())}
        for m in range(1, num_models + 1)
    ]
    return base, models


@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    st.sampled_from(FLOATS),
    st.sampled_from(METHODS),
    st.integers(2, 4),
    st.integers(1, 40),
)
@pytest.mark.filterwarnings("ignore:std")
def test_formula_in_float64(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    method: str,
    num_models: int,
    piece: int,
) -> None:
    base, models = cases(shapes, dtype, num_models)
    got, report = merged(tmp_path_factory.mktemp("merge"), base, models, method, piece=piece)
    assert got.keys() == base.keys() and report.num_tensors == len(base)
    for name, origin in base.items():
        want = by_formula(method, origin.double(), [model[name].double() for model in models])
        assert got[name].dtype == dtype and got[name].shape == origin.shape
        eps = torch.finfo(dtype).eps  # one unit in the last place, and less where the format is finer than 1e-6
        torch.testing.assert_close(got[name].double(), want.to(dtype).double(), rtol=eps, atol=min(eps, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_bitwise_the_rounded_formula(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, models = cases([(300, 200)], dtype, 2)
    got, report = merged(tmp_path, base, models, method, piece=1 << 14)
    want = by_formula(method, base["t0"].double(), [model["t0"].double() for model in models])
    assert torch.equal(got["t0"], want.to(dtype))
    norms = [float((model["t0"].double() - base["t0"].double()).norm()) for model in models]
    assert report.moved == pytest.approx(norms) and report.num_elements == 60_000 and report.unmoved == (0, 0)
    if method == "gaussian":
        assert report.outside is not None and all(0.02 < share < 0.2 for share in report.outside)
    else:
        assert report.outside is None and report.width is None


@pytest.mark.parametrize("shape", [(50,), (40, 30)])
@pytest.mark.parametrize("method", ["gaussian", "fnorm"])
def test_agrees_with_the_released_arithmetic(tmp_path: Path, method: str, shape: tuple[int, ...]) -> None:
    """float32 throughout, as ULM-R1's: only elements at the very edge of the band may differ."""
    base, models = cases([shape], torch.float32, 2)
    got, _ = merged(tmp_path, base, models, method)
    torch.testing.assert_close(
        got["t0"], by_formula(method, base["t0"], [m["t0"] for m in models]), rtol=1e-5, atol=1e-6
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(1, 20))
def test_moments_in_pieces(numbers: list[float], piece: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    moments = Moments()
    for part in values.split(piece):
        moments.add(part)
    assert moments.mean == pytest.approx(float(values.mean()), rel=1e-12, abs=1e-12)
    assert moments.norm == pytest.approx(float(values.norm()), rel=1e-12)
    if len(numbers) > 1:
        assert moments.std == pytest.approx(float(values.std()), rel=1e-9, abs=1e-12)
    else:
        assert moments.std != moments.std


def test_moments_keep_a_small_spread_on_a_large_mean() -> None:
    """Σx² − nµ² would lose all of it."""
    values = 1e8 + torch.randn(10_000, dtype=torch.float64) * 1e-3
    moments = Moments()
    for part in values.split(100):
        moments.add(part)
    assert moments.std == pytest.approx(float(values.std()), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_models_that_did_not_move_give_the_base(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, _ = cases(SHAPES, dtype, 1)
    got, report = merged(tmp_path, base, [base, base], method)
    assert all(torch.equal(got[name], base[name]) for name in base)
    assert report.unmoved == (len(base), len(base)) and report.moved == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_merged_with_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    """mean and fnorm give it back; gaussian, by its formula, takes what is outside the band twice."""
    base, (model,) = cases(SHAPES, dtype, 1)
    for method in ("mean", "fnorm"):
        got, _ = merged(tmp_path, base, [model, model], method)
        assert all(torch.equal(got[name], model[name]) for name in base), method
    got, _ = merged(tmp_path, base, [model, model], "gaussian")
    for name, origin in base.items():
        delta = model[name].double() - origin.double()
        inside = (delta - delta.mean()).abs() < 2 * delta.std(correction=1) if delta.numel() > 1 else delta != delta
        assert torch.equal(got[name], (origin.double() + torch.where(inside, delta, 2 * delta)).to(dtype)), name
    got, _ = merged(tmp_path, base, [model, model], "gaussian", width=1e9)
    several = [name for name in base if base[name].numel() > 1]
    assert all(torch.equal(got[name], model[name]) for name in several)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_order_of_models_is_irrelevant(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, models = cases(SHAPES, dtype, 3)
    one, report = merged(tmp_path, base, models[:2], method)
    two, turned = merged(tmp_path, base, models[1::-1], method)
    assert all(torch.equal(one[name], two[name]) for name in base)
    assert report.moved == turned.moved[::-1] and report.outside == (turned.outside and turned.outside[::-1])
    three, other = (merged(tmp_path, base, order, method)[0] for order in (models, models[::-1]))
    eps = torch.finfo(dtype).eps
    assert all(torch.allclose(three[name], other[name], rtol=2 * eps, atol=eps) for name in base)


def test_a_tensor_that_one_model_did_not_move(tmp_path: Path) -> None:
    """Frozen there: the other's change is taken whole, except by the plain mean; no NaN from dividing by its norm."""
    base, (model,) = cases([(20, 30), (2, 3, 3, 3)], torch.float32, 1)
    for method in ("gaussian", "fnorm"):
        for pair in ([base, model], [model, base]):
            got, report = merged(tmp_path, base, pair, method)
            assert all(torch.equal(got[name], model[name]) for name in base), method
            assert sorted(report.unmoved) == [0, 2]
    got, _ = merged(tmp_path, base, [base, model], "mean")
    for name in base:
        torch.testing.assert_close(got[name], (base[name] + model[name]) / 2)


def test_the_band_is_open(tmp_path: Path) -> None:
    """|δ − µ| < width · σ, not ≤: where all changes are the same there is no spread, and they add up."""
    got, report = merged(tmp_path, {"w": torch.zeros(8)}, [{"w": torch.ones(8)}, {"w": torch.ones(8)}], "gaussian")
    assert torch.equal(got["w"], torch.full((8,), 2.0)) and report.outside == (1.0, 1.0)


def test_fnorm_gives_small_changes_their_say(tmp_path: Path) -> None:
    """Each change is divided by its norm, over all dimensions: the larger does not win by being larger."""
    base = {"conv": torch.zeros(4, 3, 3, 3)}
    direction = [torch.randn(4, 3, 3, 3) for _ in range(2)]
    models = [{"conv": d / d.norm() * size} for d, size in zip(direction, (1.0, 10.0), strict=True)]
    got, _ = merged(tmp_path, base, models, "fnorm")
    want = sum(d / d.norm() for d in direction) / (1 / 1.0 + 1 / 10.0)
    torch.testing.assert_close(got["conv"], want)


def test_the_base_may_be_wider_than_the_models(tmp_path: Path) -> None:
    base, models = cases([(30,)], torch.float32, 2)
    models = [{"t0": model["t0"].bfloat16()} for model in models]
    got, _ = merged(tmp_path, base, models, "mean")
    want = (models[0]["t0"].double() + models[1]["t0"].double()) / 2
    assert got["t0"].dtype == torch.bfloat16
    torch.testing.assert_close(got["t0"].double(), want, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)


def test_what_cannot_be_merged_is_the_first_models(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3), "steps": torch.tensor(1)}
    models = [
        {
            "w": torch.ones(3),
            "steps": torch.tensor(10 * i),
            "new": torch.full((2,), float(i)),
            "m": torch.tensor([True]),
        }
        for i in (1, 2)
    ]
    got, report = merged(tmp_path, base, models, "mean")
    assert got["w"].tolist() == [1, 1, 1] and got["steps"] == 10 and got["new"].tolist() == [1, 1] and got["m"].item()
    assert set(report.not_in_base) == {"new", "m"} and set(report.not_float) == {"steps", "m"}
    assert report.num_tensors == 1 and report.num_elements == 3


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and two models, each with the files that lie around a checkpoint."""
    base, models = cases([(30,), (4, 5)], torch.float32, 2)
    made = [save(tmp_path / name, state) for name, state in zip(("w0", "a", "b"), [base, *models], strict=True)]
    for folder in made:
        for name in COPIED + LEFT:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{folder.name} {name}")
    return made


def test_the_folder_is_the_first_models_without_code_and_pickles(folders: list[Path], tmp_path: Path) -> None:
    report = merge_checkpoints(folders[0], folders[1:], tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*COPIED, SAFE, RECORD}
    assert all((out / name).read_text() == f"a {name}" for name in COPIED)
    assert out.stat().st_mode & 0o077 == tmp_path.joinpath("deep").stat().st_mode & 0o077, "readable as other folders"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    record = json.loads((out / RECORD).read_text())
    assert record["base"]["name"] == "w0" and [model["name"] for model in record["models"]] == ["a", "b"]
    digest = hashlib.sha256((folders[2] / SAFE).read_bytes()).hexdigest()
    assert record["models"][1]["sha256"] == {SAFE: digest} and report.models[1].sha256 == {SAFE: digest}
    assert record["method"] == "gaussian" and record["width"] == 2.0 and str(tmp_path) not in (out / RECORD).read_text()
    with safe_open(out / SAFE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "merge_method": "gaussian", "merge_base": "w0"}


def test_shards_in_and_out(folders: list[Path], tmp_path: Path) -> None:
    """The same values whatever the files; a merge can itself be merged."""
    calls: list[tuple[int, int, str]] = []
    merge_checkpoints(folders[0], folders[1:], tmp_path / "one", "mean", report=lambda *call: calls.append(call))
    merge_checkpoints(folders[0], folders[1:], tmp_path / "many", "mean", max_shard_bytes=100)
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)] and {call[2] for call in calls} == {"t0", "t1"}
    assert (tmp_path / "many" / SAFE_INDEX).is_file() and not (tmp_path / "many" / SAFE).exists()
    merge_checkpoints(tmp_path / "many", [tmp_path / "one", tmp_path / "many"], tmp_path / "again", "gaussian")
    one, again = (load_file(tmp_path / name / SAFE) for name in ("one", "again"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not (tmp_path / "again" / SAFE_INDEX).exists()


def test_a_base_on_the_hub(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, from the hub's cache; the record has the name, not the cache's folder."""
    cache = tmp_path / "cache" / "models--org--w0"
    shutil.copytree(folders[0], cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = merge_checkpoints("org/w0", folders[1:], tmp_path / "named")
    direct = merge_checkpoints(folders[0], folders[1:], tmp_path / "direct")
    states = [load_file(tmp_path / name / SAFE) for name in ("named", "direct")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert named.base.name == "org/w0" and named.base.sha256 == direct.base.sha256
    with pytest.raises(ConfigError, match="org/absent"):
        merge_checkpoints("org/absent", folders[1:], tmp_path / "out")


def refused(error: type[Exception], root: Path, *arguments: object, **options: object) -> str:
    """The message; nothing was written."""
    before = sorted(root.rglob("*"))
    with pytest.raises(error) as caught:
        merge_checkpoints(*arguments, **options)  # type: ignore[arg-type]
    assert sorted(root.rglob("*")) == before
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """All of it in one message, names, shapes and folders."""
    good = {"a": torch.zeros(3), "b": torch.zeros(2, 2), "n": torch.tensor(1)}
    save(tmp_path / "good", good)
    save(tmp_path / "shape", good | {"a": torch.zeros(4), "b": torch.zeros(4)})
    save(tmp_path / "dtype", good | {"a": torch.zeros(3).bfloat16(), "n": torch.tensor(1.0)})
    save(tmp_path / "less", {"a": good["a"]})
    save(tmp_path / "more", good | {"extra": torch.zeros(1)})
    out = tmp_path / "out"

    def pair(base: str, *models: str) -> str:
        return refused(CheckpointError, tmp_path, tmp_path / base, [tmp_path / m for m in models], out)

    message = pair("good", "good", "shape")
    assert "a: float32 [3]" in message and "float32 [4]" in message and "b: float32 [2, 2]" in message
    assert "bfloat16 [3]" in pair("good", "good", "dtype")
    message = pair("dtype", "good", "good")
    assert "n: int64 []" in message and "a: " not in message, "a base in another float dtype is no problem"
    assert "b: in" in pair("good", "less", "less"), "the base has it, the models do not"
    assert "b: in" in pair("good", "good", "less") and "b: in" in pair("good", "less", "good")
    assert "extra: in" in pair("good", "good", "more") and "extra: in" in pair("good", "more", "good")
    assert "no folder" in pair("nowhere", "good", "good")


def test_wrong_arguments(folders: list[Path], tmp_path: Path) -> None:
    base, *models = folders
    out = tmp_path / "out"
    assert "two or more" in refused(ValueError, tmp_path, base, models[:1], out)
    assert "two or more" in refused(ValueError, tmp_path, base, str(models[0]), out)
    assert "gaussian, fnorm, mean" in refused(ValueError, tmp_path, base, models, out, "slerp")
    for width in (0.0, -1.0, float("nan"), float("inf")):
        assert "width" in refused(ValueError, tmp_path, base, models, out, "gaussian", width)
    for taken in (base, base / "config.json"):
        assert "choose another name" in refused(FileExistsError, tmp_path, base, models, taken)
    out.mkdir()
    merge_checkpoints(base, models, out)
    assert (out / SAFE).is_file(), "an empty folder may be used"


def test_no_room_is_said_before(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = merge.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert "make room" in refused(OSError, tmp_path, folders[0], folders[1:], tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite(tmp_path: Path, method: str, broken: int, value: float) -> None:
    states = [{"fine": torch.zeros(3), "hurt": torch.zeros(50)} for _ in range(3)]
    states[broken]["hurt"][31] = value
    base, *models = [save(tmp_path / str(i), state) for i, state in enumerate(states)]
    assert "hurt: NaN or infinite" in refused(CheckpointError, tmp_path, base, models, tmp_path / "out", method)


def test_a_sum_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([0.0, 0.0, value, 0.0], dtype=torch.float16)} for value in (0, 5e4, 5e4)]
    base, *models = [save(tmp_path / str(i), state) for i, state in enumerate(states)]
    assert "float16" in refused(CheckpointError, tmp_path, base, models, tmp_path / "out", width=0.1)


def test_an_interrupted_merge_leaves_nothing(folders: list[Path], tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        assert list(tmp_path.glob(".out.draft-*/*/*")), "it was under way"
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(folders[0], folders[1:], tmp_path / "out", report=stop)
    assert sorted(tmp_path.rglob("*")) == before
