"""A run whose samples are packed is the run whose samples are padded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.types import Batch
from vlmtune.errors import VlmtuneError
from vlmtune.models import packing as packed
from vlmtune.models.forward import SupervisedForward


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    def make(name: str, **keys: object) -> Path:
        data = copy_sample(sample_data, tmp_path / "data", keep=12)
        settings = {
            "data__eval": str(data),
            "train__max_steps": 3,
            "train__eval_every": 3,
            "train__max_grad_norm": 0.5,
            "eval": {"max_new_tokens": 1, "max_samples": 4},
        }
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, **(settings | keys))

    return make


def test_packed_and_padded_runs_have_the_same_losses_and_adapter(make_recipe, monkeypatch):
    seen: list[bool] = []
    forward = SupervisedForward.forward

    def noting(self: SupervisedForward, batch: Batch):
        seen.append(batch.lengths is not None)
        return forward(self, batch)

    monkeypatch.setattr(SupervisedForward, "forward", noting)
    runs = []
    for packing in (True, False):
        seen.clear()
        recipe = make_recipe(f"packing-{packing}", train__packing=packing)
        train_once(recipe)
        assert set(seen) == {packing}
        runs.append(recipe.parent / "run")
    for one, other in zip(*(metrics_of(run) for run in runs), strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "grad_norm", "eval_loss", "supervised_tokens"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert any("eval_loss" in line for line in metrics_of(runs[0]))
    packed, padded = (adapter_of(run) for run in runs)
    for name, tensor in packed.items():
        assert float((tensor - padded[name]).abs().max()) < 1e-5, name


def test_a_run_whose_model_sees_across_samples_does_not_start(make_recipe, monkeypatch):
    right = packed.pack_arguments

    def without_lengths(*args):
        return {"position_ids": right(*args)["position_ids"]}

    monkeypatch.setattr("vlmtune.models.forward.pack_arguments", without_lengths)
    recipe = make_recipe("run")
    with pytest.raises(VlmtuneError, match="does not keep packed samples apart"):
        train_once(recipe)
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()
