from __future__ import annotations

import pytest
import torch

from vlmtune.models.precision import bfloat16_errors, capability_of, has_bfloat16
from vlmtune.recipe.schema import Recipe


def recipe_of(**keys: object) -> Recipe:
    values = {"model": "m", "output_dir": "run", "data": {"train": "train.jsonl"}, "rank": 4}
    return Recipe.model_validate({**values, "lora_target": ["q_proj"], **keys})


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), False), ((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True)]
    + [((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_a_gpu_has_bfloat16_since_ampere(capability, expected):
    assert has_bfloat16(capability) == expected
    assert (bfloat16_errors(recipe_of(), capability) == []) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["train.precision=fp16"]),
        ({"train": {"precision": "bf16"}}, ["train.precision=fp16"]),
        ({"train": {"precision": "fp16"}}, []),
        ({"train": {"precision": "fp32"}}, []),
        (
            {"quantization_bit": 4},
            ["train.precision=fp16", "quantization.compute_dtype=float16"],
        ),
        (
            {"quantization_bit": 4, "train": {"precision": "fp16"}},
            ["quantization.compute_dtype=float16"],
        ),
        # 8 bit computes in float16 whatever compute_dtype is by default.
        ({"quantization_bit": 8, "train": {"precision": "fp16"}}, []),
        (
            {
                "quantization_bit": 4,
                "quantization": {"compute_dtype": "float32"},
                "train": {"precision": "fp32"},
            },
            [],
        ),
    ],
)
def test_what_a_gpu_without_it_cannot_do_is_said_with_the_value_that_works(keys, expected):
    recipe = recipe_of(**keys)
    errors = [str(error) for error in bfloat16_errors(recipe, (7, 5))]
    assert len(errors) == len(expected)
    for error, value in zip(errors, expected, strict=True):
        assert f"set {value}" in error and "compute capability 7.5" in error
    assert bfloat16_errors(recipe, (8, 0)) == bfloat16_errors(recipe, None) == []


def test_only_a_cuda_device_has_a_capability():
    assert capability_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert capability_of() is None
