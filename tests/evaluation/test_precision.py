import pytest
import torch

from vlmtune.models.precision import inference_dtype


def test_a_named_dtype_is_taken() -> None:
    assert inference_dtype("bfloat16") == torch.bfloat16
    assert inference_dtype("float16") == torch.float16


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_a_cpu_runs_in_bfloat16_only_where_it_has_the_instructions(
    monkeypatch: pytest.MonkeyPatch, instructions: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert inference_dtype("auto") == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_a_gpu_without_bfloat16_runs_in_float16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert inference_dtype("auto") == expected
