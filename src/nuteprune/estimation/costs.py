"""What a training step costs, computed from the configuration alone: our own code runs on tensors without data.

Every operation of a step is seen on its way: what memory lives when, which arithmetic is done and which bytes move. So
the figures are those of exactly these options, and no formula of a transformer has to be kept in step with the code.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from nuteprune.arch import Arch, Dims
from nuteprune.config import PruneConfig
from nuteprune.gates import unit_shapes
from nuteprune.job import pick_save_dtype
from nuteprune.losses import chunks
from nuteprune.masking import MaskedModel
from nuteprune.masks import Masks
from nuteprune.quantised import BITS, bytes_in
from nuteprune.repair import held_bytes, weight_bytes
from nuteprune.roles import LoraOptions
from nuteprune.size import BlockSize

# Bytes for a value of the logits in `losses`, counted on real tensors: live at once in a chunk, and read and written.
# The cases: KL at temperature 1; at another temperature or with a language-model loss beside it; no teacher.
LOGIT_BYTES = {"kl": 16, "kl and more": 20, "no teacher": 10}
LOGIT_TRAFFIC = {"kl": 112, "kl and more": 152, "no teacher": 53}
SCORED = 256  # rows of logits in float32, with their softmax, in `evaluation.perplexity`
ADAM = 8  # bytes of moments a trainable value


@dataclass(frozen=True)
class Work:
    """Operations of a pass.

    Attributes:
        operations: floating-point operations and bytes moved (read and written) of every kernel.
    """

    operations: tuple[tuple[float, float], ...]

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations)

    @property
    def flops(self) -> float:
        """Floating-point operations; a multiply-add is two."""
        return sum(f for f, _ in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return sum(b for _, b in self.operations)


@dataclass(frozen=True)
class StepCost:
    """A step at full width: a teacher forward, the student forward and backward, heads, optimiser.

    Attributes:
        weights: bytes of the frozen model.
        lora: trainable LoRA values.
        gates: gate values.
        teacher_peak: bytes that the teacher's forward pass holds at most, besides what lives throughout.
        taught: bytes kept of the teacher until the step ends.
        kept: bytes of activations that the student's forward pass keeps for the backward pass.
        forward_peak, backward_peak: bytes that these passes hold at most, kept activations and gradients included.
        head: bytes of a chunk of logits and of the gradient of the states.
        repair: bytes that the repair of the output projections holds at most.
        repaired: bytes of the repaired projections, beside the model's own.
        evaluation: bytes of the logits of one held-out block.
        final: bytes at the end of the run, when the pruned model in the precision of its file has taken the base's place.
        teacher, student, backward, heads: the work of each part.
    """

    weights: int
    lora: int
    gates: int
    teacher_peak: int
    taught: int
    kept: int
    forward_peak: int
    backward_peak: int
    head: int
    repair: int
    repaired: int
    evaluation: int
    final: int
    teacher: Work
    student: Work
    backward: Work
    heads: Work

    @property
    def standing(self) -> int:
        """Bytes that live throughout: weights, also repaired ones, LoRA with its moments, gates, a teacher's LoRA weights."""
        return self.weights + self.repaired + (4 + ADAM) * self.lora + 4 * 8 * self.gates + 4 * self.lora

    @property
    def peak(self) -> int:
        """Bytes at the worst point of a step, of the repair, or of the evaluation."""
        passes = (
            self.teacher_peak,
            self.taught + self.forward_peak,
            self.taught + self.kept + self.head,
            self.taught + self.backward_peak,
            3 * 4 * self.lora,  # gradients, and the optimiser's own working set
            self.repair,
            self.evaluation,
        )
        return max(self.standing + max(passes), self.final)

    @property
    def work(self) -> Work:
        """All of it."""
        return self.teacher + self.student + self.heads + self.backward


def step_cost(config: PruneConfig, dense: PretrainedConfig, arch: Arch, dtype: torch.dtype) -> StepCost:
    """The cost of a step of a run on a GPU.

    Args:
        config: the run's options.
        dense: the model's configuration.
        arch: its description.
        dtype: precision of the frozen model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense, dtype=dtype)
        lora = LoraOptions(config.lora_rank, config.alpha, config.lora_targets)
        masked = MaskedModel(model, arch, config.prune, lora)
    _leave_mask_out(masked, dense, config.seq_len)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        _to_fake(masked)
        if config.gradient_checkpointing:
            masked.enable_checkpointing()
        masks = Masks.ones(arch.dims, masked.device)
        for kind, tensor in masks.tensors().items():
            tensor.requires_grad_(kind in masked.kinds)
        masked.set_masks(masks)
        ids = torch.zeros(config.batch_size, config.seq_len, dtype=torch.int64)
        weights = _bytes_of(p for p in model.parameters() if not p.requires_grad)

        teacher, teacher_peak, taught = Work(()), 0, 0
        if config.teachers != "none":
            with torch.no_grad(), _Watch() as watch:
                states = masked.forward(ids)
            teacher, teacher_peak, taught = watch.work, watch.peak, states.untyped_storage().nbytes()
            if config.hidden_loss != "none":  # its states, each replaced by the student's gradient once used
                every = (arch.dims.layers - 1) * taught
                teacher_peak, taught = teacher_peak + every, taught + every
            del states
        with _Watch() as watch:
            student_states = masked.forward(ids)
            student, kept, forward_peak = watch.work, watch.live, watch.peak
            watch.reset()
            student_states.backward(torch.ones_like(student_states))
            backward, backward_peak = watch.work, watch.peak
        size = student_states.untyped_storage().nbytes()
    evaluation = arch.dims.vocab * (config.seq_len * dtype.itemsize + SCORED * 8)
    lora_values = sum(p.numel() for p in masked.lora.values())
    removed = int(BlockSize.of(arch).full * config.sparsity)
    saved = pick_save_dtype(config.save_dtype, dense).itemsize
    gates = sum(math.prod(shape) for kind, shape in unit_shapes(arch.dims, config.head_unit).items() if kind in config.prune)
    head, heads = _head(config, arch, size)
    final = (arch.total - removed) * saved + 4 * lora_values + arch.dims.vocab * (config.seq_len * saved + SCORED * 8)
    return StepCost(
        weights=round(weights - _saved_by_codes(config.load_in, masked)),
        lora=lora_values,
        gates=gates,
        teacher_peak=teacher_peak,
        taught=taught,
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=backward_peak,
        head=head,
        repair=repair_peak(config, arch.dims, dtype),
        repaired=weight_bytes(arch.dims, dtype.itemsize) if config.repair else 0,
        evaluation=evaluation,
        final=0 if config.load_in != "none" else final,  # what a quantised base becomes is folded on the CPU
        teacher=teacher,
        student=student,
        backward=backward,
        heads=heads,
    )


def repair_peak(config: PruneConfig, dims: Dims, dtype: torch.dtype) -> int:
    """Bytes that the repair of a run holds at most beside a model of this precision; 0 without one."""
    return held_bytes(dims, config.repair_sequences, config.seq_len, dtype.itemsize) if config.repair else 0


def _saved_by_codes(option: str, masked: MaskedModel) -> float:
    """Bytes by which `--load-in` makes the frozen model smaller; one weight at a time is there in full."""
    if option not in BITS:
        return 0.0
    weights = [masked.parameter(0, f"{path}.weight") for path in masked.arch.linears()]
    full = [_bytes_of(iter([weight])) for weight in weights]
    codes = [bytes_in(weight.numel(), len(weight), option) for weight in weights]
    return masked.arch.dims.layers * (sum(full) - sum(codes)) - max(full)


def _head(config: PruneConfig, arch: Arch, states: int) -> tuple[int, Work]:
    """Memory and work of heads and losses, which compute on values and so cannot run without data."""
    tokens, vocab, hidden = config.batch_size * config.seq_len, arch.dims.vocab, arch.dims.hidden
    rows = next(chunks(tokens, vocab, torch.device("cuda")))
    products = 2 if config.teachers == "none" else 3  # student, teacher, gradient of the states
    values = tokens * vocab
    more = config.temperature != 1.0 or config.lm_weight > 0
    case = "no teacher" if config.teachers == "none" else "kl and more" if more else "kl"
    work = ((2.0 * products * values * hidden, 0.0), (0.0, float(LOGIT_TRAFFIC[case] * values)))
    each = LOGIT_BYTES[case] + (4 if arch.softcap is not None else 0)  # the cap's slope
    return each * (rows.stop - rows.start) * vocab + states, Work(work)


def _leave_mask_out(masked: MaskedModel, dense: PretrainedConfig, tokens: int) -> None:
    """Attention gets no mask, as in a run: transformers makes one only because it sees tensors without data."""
    window = getattr(dense, "sliding_window", None)
    if window is not None and tokens >= window:
        return

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": None}

    for layer in masked.layers:
        layer.get_submodule(masked.arch.spec.attention_path).register_forward_pre_hook(hook, with_kwargs=True)


def _to_fake(masked: MaskedModel) -> None:
    """Puts tensors of the present fake mode in place of those on the meta device, where autocast does not work."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in masked.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    masked.lora = {name: made[parameter] for name, parameter in masked.lora.items()}


class _Watch(TorchDispatchMode):
    """Follows the memory that operations make and the work that they do.

    Attributes:
        live: bytes alive now of tensors made since the beginning.
        peak: their most at once, since the beginning or `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._before: set[int] = set()
        self._operations: list[tuple[float, float]] = []

    @property
    def work(self) -> Work:
        """Work since the beginning or `reset`."""
        return Work(tuple(self._operations))

    def reset(self) -> None:
        """Begins another pass; what lives goes on counting."""
        self.peak, self._operations = self.live, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        for tensor in inputs:  # what was there before is not ours
            key = tensor.untyped_storage()._cdata
            if key not in self._sizes:
                self._before.add(key)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            self._add(tensor.untyped_storage())
        changes = func._schema.is_mutable
        if outputs and (changes or any(t.untyped_storage()._cdata not in given for t in outputs)):  # views are free
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
            self._operations.append((float(_flops(func, args, kwargs, result)), float(moved)))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._before:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes_of(tensors: Iterator[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Floating-point operations of matrix products and attention; others count by their bytes."""
    packet = func.overloadpacket
    name = packet.__name__
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):  # the one kernel that torch has no count for
        # Forward: scores and values, 2 products; backward: scores again and 4 gradients. No discount for causality.
        query, key = (args[1], args[2]) if name.endswith("backward") else (args[0], args[1])
        batch, heads, tokens, width = query.shape
        return (10 if name.endswith("backward") else 4) * batch * heads * tokens * key.shape[2] * width  # type: ignore[no-any-return]
    if name == "addmm_":
        name, packet = "addmm", torch.ops.aten.addmm
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))
