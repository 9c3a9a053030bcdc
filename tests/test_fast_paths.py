"""Every shortcut of the trainer takes the same way as the plain path: peft's own layers, hooks, full widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, random_masks, tiny_config, tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nuteprune import arrangement, graphed
from nuteprune.arch import Arch
from nuteprune.arrangement import Arrangement
from nuteprune.config import PruneConfig
from nuteprune.data import Blocks, build_blocks
from nuteprune.job import prune
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.models import Source
from nuteprune.progress import read_metrics
from nuteprune.roles import LoraOptions
from nuteprune.teachers import INTACT
from nuteprune.trainer import Trainer

IDS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def _trainer(
    config: PruneConfig, folder: Path, fast: bool, device: str = "cpu", warn: Callable[[str], None] = lambda _: None
) -> Trainer:
    source = Source.find(config.model)
    model = source.model(torch.device(device), torch.float32)
    path = folder / "blocks.safetensors"
    build_blocks(
        path, config.data, source.tokenizer(96), seq_len=config.seq_len, blocks=config.total_steps * config.batch_size,
        held_out=2, least=config.batch_size, seed=config.seed,
    )  # fmt: skip
    return Trainer(config, model, Arch.from_config(source.config()), Blocks.open(path), folder, warn, fast=fast)


def _trajectory(config: PruneConfig, folder: Path, fast: bool, **more: Any) -> tuple[list[dict[str, Any]], Trainer]:
    folder.mkdir(exist_ok=True)
    trainer = _trainer(config, folder, fast, **more)
    trainer.start()
    metrics: list[dict[str, Any]] = []
    assert trainer.run(metrics.append)
    return metrics, trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prune": ("heads", "intermediate"), "sparsity": 0.4, "hidden_loss": "normalised"},
        {"gates": "hard-concrete", "control": "lagrangian", "hidden_loss": "plain", "temperature": 0.7, "lm_weight": 0.3},
        {"lora_targets": ("q_proj", "v_proj")},
        {"gradient_checkpointing": True, "hidden_loss": "plain"},
        {"weight_decay": 0.5, "grad_clip": 0.1, "lora_alpha": 5.0},
    ],
    ids=["default", "wide", "paper", "q-and-v", "checkpointing", "decay"],
)  # fmt: skip
def test_fast_run_follows_the_plain_one(
    small_run: PruneConfig, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrangement, "ALIGN", 1)
    config = small_run.replace(**changes)
    plain, one = _trajectory(config, tmp_path / "a", fast=False)
    fast, two = _trajectory(config, tmp_path / "b", fast=True)
    assert [m["teacher"] for m in plain] == [m["teacher"] for m in fast]
    for a, b in zip(plain, fast, strict=True):
        for key in ("loss", "kl", "lm_loss", "hidden_loss", "expected_sparsity", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-5, nan_ok=True), (key, a["step"])
    for kind, gates in one.gates.log_alpha.items():
        torch.testing.assert_close(two.gates.log_alpha[kind], gates, rtol=1e-3, atol=1e-3)
    assert one.masks is not None
    assert two.masks is not None
    assert one.masks.counts() == two.masks.counts()
    torch.testing.assert_close(two.masked.logits(IDS), one.masked.logits(IDS), rtol=5e-3, atol=5e-3)


def _masked(fused: bool, config: Any = None, dtype: torch.dtype = torch.float32) -> MaskedModel:
    config = config or tiny_config()
    masked = MaskedModel(
        tiny_model(config, dtype=dtype), Arch.from_config(config), KINDS, LoraOptions(2, 3.0), fused=fused
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in masked.lora.values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return masked


def _gradients(masked: MaskedModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    masks = random_masks(masked.arch, 1)
    leaves = [getattr(masks, kind).requires_grad_() for kind in masked.kinds]
    masked.set_masks(masks)
    out = masked.forward(IDS)
    loss = (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()
    return out.detach(), list(torch.autograd.grad(loss, [*leaves, *masked.lora.values()]))


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", {}), ("llama", {"attention_bias": True})])
def test_one_operation_has_the_gradients_of_many(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    (a, one), (b, two) = (_gradients(_masked(fused, config, torch.float64)) for fused in (False, True))
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_what_autocast_computes() -> None:
    (a, one), (b, two) = (_gradients(_masked(fused, dtype=torch.bfloat16)) for fused in (False, True))
    assert a.dtype == b.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in two)
    exact, true = _gradients(_masked(True, dtype=torch.float32))

    def error(out: torch.Tensor, gradients: list[torch.Tensor]) -> float:
        pairs = zip([out.float(), *gradients], [exact, *true], strict=True)
        return sum(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs) / (1 + len(true))

    assert error(b, two) < 0.1  # a random model in bfloat16
    assert error(b, two) < 1.2 * error(a, one)  # and no further off than peft's layers under autocast


def test_fused_layers_keep_less_for_the_backward_pass() -> None:
    def kept(fused: bool) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        masked = _masked(fused)
        masks = random_masks(masked.arch, 1)
        for t in masks.tensors().values():
            t.requires_grad_()
        masked.set_masks(masks)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            masked.forward(IDS)
        return sum(seen.values())

    assert kept(True) < 0.95 * kept(False)


# -- arrangement -------------------------------------------------------------------------------------------------------


def _nested(masked: MaskedModel) -> tuple[Masks, list[Masks]]:
    """A student's masks, a layer of it without heads, and teachers that keep ever less."""
    student = random_masks(masked.arch, 3)
    student.heads[1] = 0.0
    teachers = [random_masks(masked.arch, seed) for seed in (4, 5)]
    return student, teachers


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("align", [1, 32])
def test_arranged_roles_compute_the_same(family: str, align: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrangement, "ALIGN", align)
    masked = _masked(True, tiny_config(family), torch.float64)
    before = {name: p.detach().clone() for name, p in masked.model.named_parameters()}
    student, teachers = _nested(masked)
    other = {name: torch.randn(p.shape).to(p.dtype) * 0.1 for name, p in masked.lora.items()}
    roles = [(None, None), (teachers[0], other), (student, dict(masked.lora)), (teachers[1], None)]

    def outputs() -> list[torch.Tensor]:
        found = []
        for masks, lora in roles:
            with masked.role(masks, lora):
                found.append(masked.logits(IDS))
        return found

    wanted = outputs()
    masked.arrange(Arrangement.of(masked.arch.dims, masked.arch.spec.narrow, student, teachers))
    for found, reference in zip(outputs(), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    widths = masked.prepare(student, None).widths
    kept = (student.intermediate != 0).sum(1).tolist()
    assert list(widths.intermediate) == [min(-(-n // align) * align, 48) for n in kept]
    assert list(widths.heads) == [max(int(n), 1) for n in (student.groups != 0).sum(1)]

    masked.restore()
    for name, p in masked.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(outputs(), wanted, strict=True))


def test_views_cost_no_memory_and_lora_goes_there_and_back() -> None:
    masked = _masked(True)
    pointers = {name: p.data_ptr() for name, p in masked.model.named_parameters() if "lora_" not in name}
    student, teachers = _nested(masked)
    masked.arrange(Arrangement.of(masked.arch.dims, masked.arch.spec.narrow, student, teachers))
    role = masked.prepare(student, None)
    masked.install(role)
    assert {name: p.data_ptr() for name, p in masked.model.named_parameters() if "lora_" not in name} == pointers
    for name, p in masked.lora.items():
        cut = masked.cut_lora(name, p.data, role.widths)
        again = masked.spread_lora(name, cut, role.widths)
        assert again.shape == p.shape
        assert torch.equal(masked.cut_lora(name, again, role.widths), cut)
        assert torch.equal(again[again != 0], p.data[again != 0])
    assert masked.model.get_submodule("model.layers.1.self_attn.q_proj.base_layer").weight.shape == (16, 32)


def test_recovery_runs_at_the_width_that_is_left(small_run: PruneConfig, tmp_path: Path) -> None:
    config = small_run.replace(prune=("heads", "intermediate"), sparsity=0.5)
    trainer = _trainer(config, tmp_path, fast=True)
    trainer.start()
    while trainer.masks is None:
        trainer.step()
    assert trainer.masked.arrangement is not None
    assert min(trainer.masked.widths.intermediate) == 32  # of 48, in multiples of 32
    assert min(trainer.masked.widths.heads) == 1
    for name, p in trainer.masked.lora.items():
        assert trainer.lora_optimizer.state[p]["exp_avg"].shape == p.shape, name


# -- torch.compile and the bank ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("aot_eager", {}),
        pytest.param("aot_eager", {"gradient_checkpointing": True, "hidden_loss": "plain"}, marks=pytest.mark.slow),
        pytest.param("inductor", {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_run_follows_the_plain_one(
    small_run: PruneConfig, backend: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_layers = []

    def compile_layer(layer: torch.nn.Module) -> None:
        compiled_layers.append(layer)
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    torch._dynamo.reset()
    counters.clear()
    config = small_run.replace(steps=10, snapshot_every=0.05, teacher_lag=1, **changes)
    eager = prune(config)
    strict: Any = torch._dynamo.config
    with strict.patch(fail_on_recompile_limit_hit=True):
        compiled = prune(config.replace(compile=True, out=str(tmp_path / "compiled")))
    assert len(compiled_layers) == 3
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 12  # by role and kind of width, not by layer or step
    for a, b in zip(read_metrics(eager.run / "metrics.jsonl"), read_metrics(compiled.run / "metrics.jsonl"), strict=True):
        for key in ("loss", "kl", "gradient_norm", "expected_sparsity"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), (key, a["step"])


def test_masks_from_elsewhere_come_to_the_arrangement() -> None:
    """Snapshots lie in CPU memory while the order is on the model's device."""
    dims = Arch.from_config(tiny_config()).dims
    order = Arrangement.of(dims, ("heads", "intermediate"), Masks.ones(dims, torch.device("cpu")), [])
    with torch.device("meta"):
        elsewhere = Arrangement(dims, order.narrow, order.heads.to("meta"), order.intermediate.to("meta"))
    assert elsewhere.masks(Masks.ones(dims, torch.device("cpu"))).heads.device.type == "meta"


class _Played:
    """What a CUDA graph does, on a CPU: it knows one place for everything that it reads and writes."""

    made = played = 0
    trainer: Trainer  # whose tensors have to stay where they are

    def __init__(self, forward: graphed.Forward, batch: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        type(self).made += 1
        self.forward, self.batch, self.parameters = forward, batch.clone(), list(parameters)
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.scalars = tuple(t.detach().clone() for t in forward(self.batch))  # the warm-up
        self.places = self.read()

    def read(self) -> list[int]:
        """Where what the passes read lies: LoRA weights, masks, frozen weights at the student's widths, the teacher's."""
        masked, teacher = self.trainer.masked, self.trainer.teacher
        roles = [masked._role, *([] if teacher is None else [teacher[1]])]
        tensors = [*self.parameters, *masked.model.parameters(), *(t for role in roles for t in role.scales.values())]
        return [t.data_ptr() for t in tensors]

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        type(self).played += 1
        assert self.read() == self.places
        self.batch.copy_(batch)
        found = self.forward(self.batch)
        for gradient, fresh in zip(self.gradients, torch.autograd.grad(found[0], self.parameters), strict=True):
            gradient.copy_(fresh)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        for scalar, now in zip(self.scalars, found, strict=True):
            scalar.copy_(now.detach())
        return self.scalars


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[_Played]:
    """Trainers made from here on record their last steps."""

    class Played(_Played):
        pass

    real = Trainer.start

    def start(trainer: Trainer) -> None:
        Played.trainer = trainer
        real(trainer)

    monkeypatch.setattr(Trainer, "start", start)
    monkeypatch.setattr(graphed, "GraphedPasses", Played)
    monkeypatch.setattr(Trainer, "recordable", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return Played


@pytest.mark.parametrize(
    ("changes", "recorded"),
    [
        ({"walk_back": False}, 8),  # the last third, in which masks are frozen
        ({"teachers": "none"}, 8),
        ({"hidden_loss": "plain", "walk_back": False}, 8),
        ({}, 1),  # teachers walk back to the intact model, which the last step reaches
        ({"method": "taylor", "gate_init": "taylor", "walk_back": False, "teachers": "intact", "repair": True}, 24),
    ],
    ids=["default", "no-teacher", "hidden-loss", "walk-back", "one-shot"],
)
def test_recorded_steps_are_the_last_ones_and_train_the_same(
    small_run: PruneConfig, changes: dict[str, Any], recorded: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = small_run.replace(**changes)
    plain, one = _trajectory(config, tmp_path / "a", fast=True)
    graphs = request.getfixturevalue("graphs")
    found, two = _trajectory(config, tmp_path / "b", fast=True)
    assert (graphs.made, graphs.played) == (1, recorded)
    for a, b in zip(plain, found, strict=True):
        for key in ("loss", "kl", "lm_loss", "hidden_loss", "gradient_norm", "teacher"):
            assert b[key] == a[key] or a[key] != a[key] != b[key] != b[key], (key, a["step"])
    for name, tensor in one.masked.lora.items():
        assert torch.equal(two.masked.lora[name], tensor), name


def test_a_recorded_step_that_is_left_out_and_a_resumed_run(
    small_run: PruneConfig, graphs: type[_Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run.replace(walk_back=False)
    infinite = {19}
    real = Trainer.update

    def update(trainer: Trainer, loss: Tensor | None, average: float, step: int) -> float:
        return real(trainer, loss, float("inf") if step in infinite else average, step)

    monkeypatch.setattr(Trainer, "update", update)
    metrics, straight = _trajectory(config, tmp_path / "a", fast=True)
    assert [m["step"] for m in metrics if m["gradient_norm"] != m["gradient_norm"]] == [19]
    (tmp_path / "b").mkdir()
    first = _trainer(config, tmp_path / "b", fast=True)
    first.start()
    assert not first.run(lambda line: None, lambda: first.state.step == 21)
    graphs.trainer = again = _trainer(config, tmp_path / "b", fast=True)
    again.load()
    assert again.state.step == 21
    assert again.run(lambda line: None)
    assert graphs.made == 3
    for name, tensor in straight.masked.lora.items():
        assert torch.equal(again.masked.lora[name], tensor), name


def test_what_cannot_be_recorded_is_told_once_and_runs_as_before(
    small_run: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, one = _trajectory(small_run, tmp_path / "a", fast=True)

    def refuse(forward: graphed.Forward, batch: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        forward(batch)[0].backward()  # a recording that breaks leaves gradients behind
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "GraphedPasses", refuse)
    monkeypatch.setattr(Trainer, "recordable", True)
    told: list[str] = []
    found, two = _trajectory(small_run, tmp_path / "b", fast=True, warn=told.append)
    assert [line for line in told if "without a CUDA graph" in line and "not permitted" in line] == [told[-1]]
    assert [m["gradient_norm"] for m in found] == [m["gradient_norm"] for m in plain]
    for name, tensor in one.masked.lora.items():
        assert torch.equal(two.masked.lora[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "possible"),
    [({}, True), ({"gradient_checkpointing": True}, False), ({"compile": True}, False)],
)
def test_steps_are_recorded_on_a_gpu_alone(
    small_run: PruneConfig, changes: dict[str, Any], possible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(small_run.replace(**changes), tmp_path, fast=True)
    assert not trainer.recordable
    monkeypatch.setattr(MaskedModel, "device", torch.device("cuda"))
    assert trainer.recordable is possible
    trainer.fast = False
    assert not trainer.recordable
    trainer.fast, trainer.masked.rigid = True, True  # codes of fewer bits, or weights parted among processes
    assert not trainer.recordable


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("hidden_loss", ["none", "normalised"])
def test_a_graph_gives_the_gradients_of_the_passes_that_it_recorded(
    small_run: PruneConfig, hidden_loss: str, tmp_path: Path
) -> None:
    config = small_run.replace(walk_back=False, hidden_loss=hidden_loss)
    trainer = _trainer(config, tmp_path, fast=True, device="cuda", warn=pytest.fail)
    trainer.start()
    while trainer.state.step < 18:
        trainer.step()
    assert trainer.recorder._recorded is not None
    for step in (20, 21):
        batch = trainer.blocks.batch(step, 2, 0).cuda()
        trainer.lora_optimizer.zero_grad()
        loss, *_ = trainer.forward(INTACT, batch, config.sparsity)
        loss.backward()
        wanted = [p.grad.clone() for p in trainer.masked.lora.values() if p.grad is not None]
        replayed, *_ = trainer.recorder._recorded(batch)
        torch.testing.assert_close(replayed, loss.detach())
        for parameter, gradient in zip(trainer.masked.lora.values(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_passes_that_wait_for_the_device_are_refused_and_harm_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, device="cuda"))
    stream, told = torch.cuda.current_stream(), []

    def waits(ids: Tensor) -> tuple[Tensor, ...]:
        return ((weight * float(ids.sum())).sum(),)

    recorder = graphed.Recorder(True, {"weight": weight}, told.append)
    assert recorder.of(waits, torch.ones(2, 3, dtype=torch.long, device="cuda")) is None
    assert len(told) == 1
    assert weight.grad is None
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert graphed.GraphedPasses(lambda ids: ((weight * ids.sum()).sum(),), torch.ones(2, 3, device="cuda"), [weight])
