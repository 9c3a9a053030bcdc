"""One frozen model in many roles: masks and LoRA weights make it the student, a teacher, or itself again.

Masks act through forward hooks on the stock modules, attached after LoRA wraps them, so that the LoRA branch is masked
too. Nothing of the base model is copied or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.arch import Arch, Axis, Linear, layers, submodule
from nuteprune.errors import ConfigError
from nuteprune.masks import Masks

# Where the mask of a kind acts: on the input of the linears that read this axis.
_INPUT_AXES = {"heads": Axis.QUERY, "intermediate": Axis.INTERMEDIATE}


@dataclass(frozen=True)
class LoraOptions:
    """LoRA of all decoder layers.

    Attributes:
        rank: rank r.
        alpha: the branch is scaled by alpha / r.
        targets: names of linear modules, or ("all",).
        seed: seed of the initial A matrices.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("all",)
    seed: int = 0

    def modules(self, arch: Arch) -> list[str]:
        """Paths inside a layer of the modules that get LoRA.

        Raises:
            ConfigError: a target that the family does not have.
        """
        known = {
            path.rpartition(".")[2]: path
            for path, part in arch.spec.block.items()
            if isinstance(part, Linear) and f"{path}.weight" in arch.parameters
        }
        if self.targets == ("all",):
            return list(known.values())
        for target in self.targets:
            if target not in known:
                raise ConfigError(f"--lora-targets got {target!r}; allowed are all, {', '.join(known)}.")
        return [known[t] for t in self.targets]


@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass yields.

    Attributes:
        last: hidden states after the final norm, [batch, tokens, hidden].
        layers: hidden states after each layer but the last, each [batch, tokens, hidden]; empty unless asked for.
    """

    last: Tensor
    layers: tuple[Tensor, ...] = ()


class MaskedModel:
    """A stock causal language model, frozen, with LoRA weights and mask hooks.

    Args:
        model: the intact model; it is wrapped in place and stays usable.
        arch: its description.
        kinds: unit kinds that masks may act on.
        lora: LoRA options, or None for masks alone.
    """

    def __init__(self, model: PreTrainedModel, arch: Arch, kinds: tuple[str, ...], lora: LoraOptions | None) -> None:
        self.arch = arch
        self.kinds = kinds
        self.model = model.eval().requires_grad_(False)
        self._scales: dict[str, tuple[Tensor, ...]] = {}
        self._tuners: list[BaseTunerLayer] = []
        self.lora: dict[str, nn.Parameter] = {}
        if lora is not None:
            self._add_lora(lora)
        self._stash = [torch.empty_like(p) for p in self.lora.values()]
        self._attach()

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _add_lora(self, lora: LoraOptions) -> None:
        targets = [
            f"{self.arch.spec.layers}.{index}.{path}"
            for index in range(self.arch.dims.layers)
            for path in lora.modules(self.arch)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lora.seed)
            config: Any = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
            inject_adapter_in_model(config, self.model)
        self._tuners = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self.lora = {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}
        for parameter in self.lora.values():  # trained in float32 whatever the base is in
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def _attach(self) -> None:
        spec = self.arch.spec
        for index, layer in enumerate(layers(self.model, spec)):
            for kind, axis in _INPUT_AXES.items():
                if kind in self.kinds:
                    for path in self.arch.linears(in_=axis):
                        submodule(layer, path).register_forward_pre_hook(self._input_hook(kind, index))
            if "hidden" in self.kinds:
                for path in self.arch.linears(out=Axis.HIDDEN):
                    submodule(layer, path).register_forward_hook(self._output_hook())
        if "hidden" in self.kinds:
            submodule(self.model, spec.embedding).register_forward_hook(self._output_hook())

    def _input_hook(self, kind: str, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            scales = self._scales.get(kind)
            return None if scales is None else (args[0] * scales[index], *args[1:])

        return hook

    def _output_hook(self) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            scales = self._scales.get("hidden")
            return None if scales is None else output * scales[0]

        return hook

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward pass; masks must stay installed until it is done."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in layers(self.model, self.arch.spec):
            layer.training = True  # transformers checkpoints layers in training mode; children stay free of dropout

    # -- roles --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the base model lives."""
        return self.model.device

    def set_masks(self, masks: Masks | None) -> None:
        """Installs masks (kept in the graph), or none."""
        if masks is None:
            self._scales = {}
            return
        dims = self.arch.dims
        like = {"device": self.device, "dtype": self.model.dtype}
        heads = masks.heads.to(**like).repeat_interleave(dims.queries * dims.head_dim, dim=1)
        every = {
            "heads": heads.unbind(0),
            "intermediate": masks.intermediate.to(**like).unbind(0),
            "hidden": (masks.hidden.to(**like),),
        }
        self._scales = {kind: every[kind] for kind in self.kinds}

    @torch.no_grad()
    def lora_copy(self) -> dict[str, Tensor]:
        """A copy of the LoRA weights on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.lora.items()}

    @torch.no_grad()
    def load_lora(self, tensors: dict[str, Tensor]) -> None:
        """Copies LoRA weights in."""
        if self.lora:
            torch._foreach_copy_(list(self.lora.values()), [tensors[name] for name in self.lora])

    @contextmanager
    def role(self, masks: Masks | None, lora: dict[str, Tensor] | None) -> Iterator[None]:
        """The model as a teacher: its masks and LoRA weights inside the block, the student's again after it.

        Args:
            masks: the teacher's masks; None for the intact model.
            lora: the teacher's LoRA weights; None switches LoRA off.
        """
        before = self._scales
        self.set_masks(masks)
        with torch.no_grad():
            if lora is None:
                for tuner in self._tuners:
                    tuner.enable_adapters(False)
            elif self.lora:
                torch._foreach_copy_(self._stash, list(self.lora.values()))
                self.load_lora(lora)
        try:
            yield
        finally:
            self._scales = before
            with torch.no_grad():
                if lora is None:
                    for tuner in self._tuners:
                        tuner.enable_adapters(True)
                elif self.lora:
                    torch._foreach_copy_(list(self.lora.values()), self._stash)

    def forward(self, input_ids: Tensor, layer_states: bool = False) -> DecoderOutput:
        """Runs the decoder in the present role, without the head.

        Args:
            input_ids: [batch, tokens], int64.
            layer_states: also return the hidden states after each layer but the last (transformers gives that one normed).
        """
        decoder = getattr(self.model, self.model.base_model_prefix)
        out = decoder(input_ids=input_ids, use_cache=False, output_hidden_states=layer_states)
        return DecoderOutput(out.last_hidden_state, tuple(out.hidden_states[1:-1]) if layer_states else ())

    @property
    def head(self) -> nn.Linear:
        """The language-model head."""
        head = submodule(self.model, self.arch.spec.head)
        assert isinstance(head, nn.Linear)
        return head

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocab] in the present role."""
        return self.head(self.forward(input_ids).last)

    def delta(self, layer: int, path: str) -> Tensor | None:
        """What LoRA adds to the weight [out, in] of a module of a layer, float64, or None."""
        module = submodule(layers(self.model, self.arch.spec)[layer], path)
        if isinstance(module, BaseTunerLayer):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()  # type: ignore[attr-defined]
            return (b.double() @ a.double()) * module.scaling["default"]  # type: ignore[attr-defined,no-any-return]
        return None

    def parameter(self, layer: int, name: str) -> Tensor:
        """The intact parameter `name` of a layer."""
        path, _, kind = name.rpartition(".")
        module = submodule(layers(self.model, self.arch.spec)[layer], path)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return getattr(base, kind).detach()  # type: ignore[no-any-return]
