from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.report.runs import make_run
from vlmtune.data.types import IGNORED, Sample, Source
from vlmtune.models.load import load_processor
from vlmtune.recipe.load import load_resolved
from vlmtune.report.data_stats import data_statistics, distribution, picture_token_id
from vlmtune.report.pictures import Thumbnails
from vlmtune.report.preview import marked_pieces


def statistics_of(run: Path):
    recipe = load_resolved(run / "recipe.resolved.yaml")
    return data_statistics(recipe, run, thumbnails=Thumbnails(), max_samples=5)


def test_counts_and_masks_are_those_of_training(tmp_path: Path, tiny_vlm: Path) -> None:
    found = statistics_of(make_run(tmp_path / "r", model=tiny_vlm, num_samples=12))
    assert (found.reason, found.num_samples, found.num_read, found.num_refused) == ("", 12, 5, 0)
    counts = {d.name: d.percentiles for d in found.distributions}
    assert counts["pictures"] == (1, 1, 1, 1, 1)
    assert counts["picture tokens"] == (16, 16, 16, 16, 16)  # 56 x 56 pixels, 14 x 14 a token
    assert counts["supervised tokens"] == (2, 2, 2, 2, 2)  # the answer and its end
    sample = found.samples[0]
    assert "".join(p.text for p in sample.pieces if p.kind == "taught") == "yes<|im_end|>"
    assert [p.text for p in sample.pieces if p.kind == "picture"] == ["[picture: 16 tokens]"]
    assert "Is it number 0?" in "".join(p.text for p in sample.pieces if p.kind == "plain")
    assert sample.pictures[0].src


def test_a_sample_that_cannot_be_encoded_is_counted(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=3)
    (tmp_path / "r-data" / "images" / "1.png").unlink()
    found = statistics_of(run)
    assert (found.num_read, found.num_refused, len(found.samples)) == (3, 1, 2)


def test_data_or_a_processor_that_is_gone_is_a_reason(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=1)
    (run / "adapter" / "tokenizer.json").unlink()
    assert "tokenizer" in statistics_of(run).reason
    (tmp_path / "r-data" / "data.jsonl").unlink()
    assert "no such data file" in statistics_of(run).reason
    assert data_statistics(None, run, thumbnails=Thumbnails()).reason


def test_an_end_that_is_in_no_input_is_marked_as_taught(tiny_vlm: Path) -> None:
    processor = load_processor(str(tiny_vlm))
    tokenizer = processor.tokenizer
    image = picture_token_id(processor)
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [image, image, no, yes, no]
    targets = [IGNORED, IGNORED, yes, end, IGNORED]  # after `yes` the end is taught, `no` stands
    sample = Sample("a", Source("f", 1), torch.tensor(ids), torch.tensor(targets))
    pieces = [(p.kind, p.text) for p in marked_pieces(sample, tokenizer, image)]
    assert pieces == [
        ("picture", "[picture: 2 tokens]"),
        ("plain", "no"),
        ("taught", "yes<|im_end|>"),
        ("plain", "no"),
    ]


@pytest.mark.parametrize("values", [[3], [1, 2, 2, 5], list(range(1000))])
def test_the_bars_hold_every_value(values: list[int]) -> None:
    found = distribution("tokens", values)
    assert found.percentiles[0] == min(values) and found.percentiles[-1] == max(values)
    assert max(bar.height for bar in found.bars) == 100
    counted = [int(bar.label.rsplit(" ", 2)[1]) for bar in found.bars]
    assert sum(counted) == len(values)
