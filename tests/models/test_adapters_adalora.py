"""AdaLoRA: the budget, the importance by hand, the masks, the penalty, both exports."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.models.adapted import (
    adapted,
    logits_of,
    open_base,
    picture_inputs,
    randomise,
    recipe_for,
    text_inputs,
)
from tests.tiny_models import save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.adalora import (
    AdaLoraAdapter,
    BudgetSchedule,
    RankAllocator,
    Triplets,
    schedule_steps,
)
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.recipe.schema import AdaLoraSection

SECTION = {"initial_rank": 6, "target_rank": 3, "warmup": 2, "final": 3, "interval": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def build(model_folder, *, total_steps=10, section=SECTION, **changes) -> AdaLoraAdapter:
    torch.manual_seed(0)
    recipe = recipe_for(model_folder, adalora=section, **changes)
    adapter = build_adapter(open_base(model_folder), recipe, total_steps=total_steps)
    randomise(adapter.model)
    assert isinstance(adapter, AdaLoraAdapter)
    return adapter


def train(adapter, steps, *, inputs=None, penalty=True):
    """Plain steps; returns what `after_step` logged, by step."""
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05)
    logged = {}
    for step in steps:
        logits = adapter.model(**(inputs or text_inputs()), use_cache=False).logits
        loss = logits.logsumexp(-1).mean()
        term = adapter.penalty() if penalty else None
        (loss if term is None else loss + term).backward()
        optimizer.step()
        logged[step] = adapter.after_step(step)
        optimizer.zero_grad()
    return logged


# The budget


def test_the_budget_follows_the_papers_cubic_curve():
    schedule = BudgetSchedule(start=120, target=80, warmup=10, final=30, total=100, interval=10)
    for step in range(1, 101):
        if step <= 10:
            expected = 120.0
        elif step <= 70:
            expected = 80 + 40 * (1 - (step - 10) / (100 - 10 - 30)) ** 3  # eq. 12
        else:
            expected = 80.0
        assert schedule.budget_at(step) == int(expected + 1e-9)
    assert [t for t in range(1, 101) if schedule.prunes_at(t)] == [20, 30, 40, 50, 60, 70]
    assert schedule.budget_at(40) == 85  # by hand: 80 + 40 / 8
    assert schedule.budget_at(40) != 100  # a straight line


def test_the_last_pruning_is_at_the_final_phase_even_off_the_interval():
    schedule = BudgetSchedule(start=12, target=6, warmup=1, final=2, total=9, interval=5)
    assert [t for t in range(1, 10) if schedule.prunes_at(t)] == [5, 7]
    assert schedule.budget_at(7) == 6


def test_fractions_are_of_the_optimizer_steps_and_counts_are_counts():
    assert schedule_steps(AdaLoraSection(warmup=0.1, final=0.3), total_steps=50) == (5, 15)
    assert schedule_steps(AdaLoraSection(warmup=7, final=0.5), total_steps=50) == (7, 25)


@pytest.mark.parametrize("warmup, final", [(5, 5), (0.5, 0.5), (10, 0)])
def test_a_schedule_without_a_pruning_step_is_refused(warmup, final):
    section = AdaLoraSection(warmup=warmup, final=final)
    with pytest.raises(VlmtuneError, match=r"adalora\.warmup and adalora\.final leave no"):
        schedule_steps(section, total_steps=10)


# Importance and masks


def one_module(rank=2):
    torch.manual_seed(3)
    return Triplets(
        a=torch.randn(rank, 3, requires_grad=True),
        e=torch.randn(rank, 1, requires_grad=True),
        b=torch.randn(4, rank, requires_grad=True),
    )


def schedule(**changes):
    values = {"start": 4, "target": 2, "warmup": 1, "final": 1, "total": 9, "interval": 3}
    return BudgetSchedule(**(values | changes))


def set_gradients(triplets, *, e=None):
    generator = torch.Generator().manual_seed(5)
    for kind, p in triplets.tensors().items():
        p.grad = torch.randn(p.shape, generator=generator)
        if kind == "e" and e is not None:
            p.grad = torch.full_like(p, e)


def test_the_score_is_the_papers():
    module = one_module()
    allocator = RankAllocator({"m": module}, schedule(), beta1=0.85, beta2=0.6)
    average = {k: torch.zeros_like(p) for k, p in module.tensors().items()}
    uncertainty = {k: torch.zeros_like(p) for k, p in module.tensors().items()}
    for step in (1, 2):
        set_gradients(module)
        module.e.grad *= step
        allocator.update(step)
        for kind, p in module.tensors().items():
            sensitivity = (p * p.grad).abs().detach()  # eq. 8
            average[kind] = 0.85 * average[kind] + 0.15 * sensitivity  # eq. 9
            gap = (sensitivity - average[kind]).abs()
            uncertainty[kind] = 0.6 * uncertainty[kind] + 0.4 * gap  # eq. 10
    entry = {k: average[k] * uncertainty[k] for k in average}  # eq. 11
    for i in range(2):
        expected = entry["e"][i, 0] + entry["a"][i].sum() / 3 + entry["b"][:, i].sum() / 4  # eq. 7
        assert allocator.scores("m")[i].item() == pytest.approx(expected.item(), rel=1e-5)
        without_b = entry["e"][i, 0] + entry["a"][i].sum() / 3
        assert allocator.scores("m")[i].item() != pytest.approx(without_b.item(), rel=1e-5)


@pytest.mark.parametrize("gradient", ["none", "zero"])
def test_a_module_that_the_data_did_not_reach_keeps_its_importance(gradient):
    modules = {"vision": one_module(), "language": one_module()}
    allocator = RankAllocator(modules, schedule(), beta1=0.85, beta2=0.85)
    for module in modules.values():
        set_gradients(module)
    allocator.update(1)
    before = {path: allocator.scores(path).clone() for path in modules}
    set_gradients(modules["vision"], e=0.0)  # the penalty still reaches A and B
    if gradient == "none":
        modules["vision"].e.grad = None
    allocator.update(2)
    assert torch.equal(allocator.scores("vision"), before["vision"])
    assert not torch.equal(allocator.scores("language"), before["language"])


def averages(allocator: RankAllocator) -> dict[str, torch.Tensor]:
    kinds = ("importance", "uncertainty")
    return {n: t.clone() for n, t in allocator.state_dict().items() if n.startswith(kinds)}


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("kind", ["a", "e", "b"])
def test_a_gradient_that_is_not_finite_never_enters_the_averages(kind, value):
    modules = {"broken": one_module(), "sound": one_module()}
    allocator = RankAllocator(modules, schedule(), beta1=0.85, beta2=0.85)
    for step in (1, 2):
        for module in modules.values():
            set_gradients(module)
        if step == 2:
            broken = modules["broken"].tensors()[kind]
            broken.grad[0, 0] = value
            with torch.no_grad():
                broken[0, 0] = 10.0  # 1e38 times it is no float32 either
        before = averages(allocator)
        allocator.update(step)
    after = averages(allocator)
    of_broken = [name for name in after if ".broken." in name]
    assert len(of_broken) == 6 and all(torch.equal(after[n], before[n]) for n in of_broken)
    assert not any(torch.equal(after[n], before[n]) for n in after if ".sound." in n)


def test_a_skipped_step_counts_for_the_schedule_and_not_for_the_importance():
    allocator, wrong = (
        RankAllocator({"m": one_module(), "n": one_module()}, schedule(), beta1=0.85, beta2=0.85)
        for _ in range(2)
    )
    for step in range(1, 9):
        skips = step in (4, 8)  # 8 is the last choice of the masks
        # Somewhere else is an infinity: what is finite in a skipped step says nothing either.
        larger = "m" if skips else "n"
        for one in (allocator, wrong):
            for path, module in one.triplets.items():
                set_gradients(module)
                for p in module.tensors().values():
                    p.grad *= 1000.0 if path == larger else 1.0
        before = averages(allocator)
        allocator.update(step, skipped=torch.tensor(skips))
        assert all_equal(averages(allocator), before) == skips
        wrong.update(step)
    assert allocator.ranks() == {"m": 0, "n": 2} != wrong.ranks()
    for path, module in allocator.triplets.items():
        assert torch.equal(module.e.squeeze(1) != 0, allocator.masks[path])


def test_exactly_the_budget_is_kept_also_among_equals():
    modules = {"m": one_module(), "n": one_module()}
    allocator = RankAllocator(modules, schedule(), beta1=0.85, beta2=0.85)
    for step in range(1, 9):
        allocator.update(step)  # no gradients: all scores are 0
    assert allocator.ranks() == {"m": 2, "n": 0}


def test_a_step_left_out_is_our_own_error():
    allocator = RankAllocator({"m": one_module()}, schedule(start=2), beta1=0.85, beta2=0.85)
    allocator.update(1)
    with pytest.raises(AssertionError, match="step 2 is due"):
        allocator.update(3)


def test_ranks_fall_to_the_target_and_stay(model_folder):
    adapter = build(model_folder)
    modules = len(adapter.allocator.masks)
    logged = train(adapter, range(1, 11))
    # Pruned at 4, 6 and 7; at 7 the curve has nothing left to take.
    assert [t for t, fields in logged.items() if fields] == [4, 6]
    totals = [logged[t]["total_rank"] for t in (4, 6)]
    assert totals == [adapter.allocator.schedule.budget_at(t) for t in (4, 6)]
    assert totals[-1] == 3 * modules == sum(logged[6]["ranks"].values())
    for path, layer in tuner_layers(adapter.model).items():
        kept = layer.lora_E["default"].squeeze(1) != 0
        assert torch.equal(kept, adapter.allocator.masks[path])


def test_before_the_last_pruning_a_pruned_entry_may_grow_back(model_folder):
    adapter = build(model_folder, lora_target=["q_proj", "v_proj"])
    train(adapter, range(1, 6))  # pruned at 4; step 5 is in between
    masks = adapter.allocator.masks
    e = {p: layer.lora_E["default"].squeeze(1) for p, layer in tuner_layers(adapter.model).items()}
    assert any((e[path][~masks[path]] != 0).any() for path in masks)
    train(adapter, range(6, 9))  # 7 was the last: from there on they stay pruned
    assert all((e[path][~masks[path]] == 0).all() for path in masks)


def test_a_module_too_small_for_the_rank_starts_lower_and_keeps_the_scale(model_folder, tmp_path):
    section = SECTION | {"initial_rank": 48, "target_rank": 20}
    adapter = build(model_folder, section=section, lora_target=["q_proj", "k_proj"])
    layers = tuner_layers(adapter.model)
    assert sorted(layer.r["default"] for layer in layers.values()) == [32, 32, 48, 48]
    assert {layer.ranknum["default"].item() for layer in layers.values()} == {48.0}
    assert adapter.allocator.schedule.start == 160
    assert train(adapter, range(1, 11))[7]["total_rank"] == 80
    adapter.save(tmp_path)
    stock = PeftModel.from_pretrained(open_base(model_folder).model, tmp_path)
    assert torch.equal(logits_of(stock), logits_of(adapter.model))


# The penalty


def test_the_penalty_is_the_weighted_mean_of_the_gram_norms(model_folder):
    adapter = build(model_folder, section=SECTION | {"orthogonal_weight": 0.25})
    norms = []
    for layer in tuner_layers(adapter.model).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        norms += [(a @ a.T - torch.eye(6)).pow(2).sum().sqrt()]
        norms += [(b.T @ b - torch.eye(6)).pow(2).sum().sqrt()]
    expected = 0.25 * torch.stack(norms).mean()
    assert adapter.penalty().item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.penalty(), adapter.penalty().float())
        assert adapter.penalty().item() == pytest.approx(expected.item(), rel=1e-6)
    without = build(model_folder, section=SECTION | {"orthogonal_weight": 0.0})
    assert without.penalty() is None


def test_the_penalty_equals_pefts(model_folder):
    adapter = build(model_folder)
    inputs = text_inputs()
    adapter.model.eval()
    outputs = adapter.model.base_model(**inputs, labels=inputs["input_ids"], use_cache=False)
    plain = adapter.model.get_base_model()(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert (outputs.loss - plain.loss).item() == pytest.approx(adapter.penalty().item(), rel=1e-4)


def test_no_adapter_tensor_is_decayed(model_folder):
    adapter = build(model_folder, modules_to_save=["connector"])
    trained = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
    decayed = trained - adapter.no_decay_names()
    assert decayed and all("modules_to_save" in name for name in decayed)


# Checkpoints and exports


def test_a_resumed_run_is_the_uninterrupted_one_across_a_pruning(model_folder):
    whole = build(model_folder)
    train(whole, range(1, 11))
    first = build(model_folder)
    train(first, range(1, 6))
    state = {name: t.clone() for name, t in first.state_dict().items()}
    resumed = build(
        model_folder,
    )
    resumed.load_state_dict(state)
    train(resumed, range(6, 11))
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())
    forgetful = build(model_folder)
    forgetful.load_state_dict(
        {n: torch.zeros_like(t) if "uncertainty" in n else t for n, t in state.items()}
    )
    train(forgetful, range(6, 11))
    assert any(not torch.equal(t, whole.state_dict()[n]) for n, t in forgetful.state_dict().items())


def pruned(model_folder, **changes) -> AdaLoraAdapter:
    """Trained on text only: the vision modules are never reached and end at rank 0."""
    adapter = build(model_folder, section=SECTION | {"target_rank": 1}, **changes)
    train(adapter, range(1, 11))
    ranks = adapter.allocator.ranks()
    assert all(rank == 0 for path, rank in ranks.items() if "visual" in path)
    assert 0 < sum(ranks.values()) == len(ranks)
    return adapter


def test_both_exports_give_the_trained_logits_with_modules_of_rank_0(model_folder, tmp_path):
    adapter = pruned(model_folder, modules_to_save=["connector"], alpha=7.5)
    adapter.save(tmp_path)
    inputs = picture_inputs(open_base(model_folder))
    expected = logits_of(adapter.model, inputs)
    for folder in (tmp_path, tmp_path / "lora"):
        stock = PeftModel.from_pretrained(open_base(model_folder).model, folder)
        torch.testing.assert_close(logits_of(stock, inputs), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert min(config["rank_pattern"].values()) == 1
    shapes = {n: t.shape for n, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert any(0 in shape for shape in shapes.values())


@pytest.mark.parametrize("mistake", ["E not folded", "scaled by the kept rank"])
def test_a_wrong_export_would_be_seen(model_folder, tmp_path, mistake):
    adapter = pruned(model_folder)
    adapter.save(tmp_path)
    stock = PeftModel.from_pretrained(open_base(model_folder).model, tmp_path / "lora")
    for path, layer in tuner_layers(stock).items():
        mask = adapter.allocator.masks[path]
        if mask.any() and mistake == "E not folded":
            layer.lora_A["default"].weight.data = adapter.allocator.triplets[path].a[mask].detach()
        elif mask.any():
            layer.scaling["default"] = 32 / int(mask.sum())
    difference = (logits_of(stock) - logits_of(adapter.model)).abs().max()
    assert difference > 1e-3


def test_saving_leaves_the_training_state_alone(model_folder, tmp_path):
    adapter = pruned(model_folder)
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    adapter.save(tmp_path)
    assert adapter.model.peft_config["default"].rank_pattern in (None, {})
    assert all(torch.equal(t, before[n]) for n, t in adapter.state_dict().items())


def test_pruned_tensors_are_exact_on_a_bfloat16_base(model_folder, tmp_path):
    from vlmtune.models.open import open_target

    adapter = adapted(model_folder, total_steps=10, adalora=SECTION)
    adapter.save(tmp_path)
    opened = open_target(tmp_path, dtype=torch.bfloat16, device="cpu")
    for path, layer in tuner_layers(opened.vlm.model).items():
        mask = adapter.allocator.masks[path]
        assert torch.equal(layer.lora_A["default"], adapter.allocator.triplets[path].a[mask])


def test_a_bfloat16_base_trains_the_same_tensors_and_forgets_no_rank(model_folder):
    adapters = {
        dtype: build_adapter(
            open_base(model_folder, dtype=dtype),
            recipe_for(model_folder, adalora=SECTION),
            total_steps=10,
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    trained = {
        dtype: {n for n, p in adapter.model.named_parameters() if p.requires_grad}
        for dtype, adapter in adapters.items()
    }
    assert trained[torch.bfloat16] == trained[torch.float32]
    assert not [name for name in trained[torch.bfloat16] if "ranknum" in name]
    # Once with autocast, as training does it on a bfloat16 base.
    adapter = adapters[torch.bfloat16]
    randomise(adapter.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adapter.model(**text_inputs(), use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    reached = {n: p.grad is not None for n, p in adapter.model.named_parameters() if "lora_E" in n}
    assert all(has for name, has in reached.items() if ".visual." not in name)
