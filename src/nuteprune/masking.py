"""One frozen model in many roles: masks and LoRA weights make it the student, a teacher, or itself again.

Masks act on the input or output of the stock modules, outside of LoRA, so that the LoRA branch is masked too. A role
switch moves pointers; nothing of the base model is copied. `arrange` alone touches it: it puts units in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.arch import BLOCKS, Arch, Axis, Dim, layers, submodule
from nuteprune.arrangement import Arrangement, Widths
from nuteprune.linear import MaskedLoraLinear, mask_hooks
from nuteprune.masks import Masks
from nuteprune.precision import half_autocast
from nuteprune.quantised import QuantisedLinear
from nuteprune.roles import BaseWeight, LoraOptions, Role, Site

# Where the mask of a kind acts: on the input of the linears that read this axis.
_INPUT_AXES = {"heads": Axis.QUERY, "intermediate": Axis.INTERMEDIATE}

Observer = Callable[[int, Tensor], None]


class MaskedModel:
    """A stock causal language model, frozen, with LoRA weights and masks.

    Args:
        model: the intact model; it is wrapped in place and stays usable.
        arch: its description.
        kinds: unit kinds that masks may act on; `layers` is `attention` and `mlp`.
        lora: LoRA options, or None for masks alone.
        fused: compute LoRA and masks in one operation (`linear`); False takes peft's own layers and hooks, slower, the
            reference that tests compare with.
    """

    def __init__(
        self, model: PreTrainedModel, arch: Arch, kinds: tuple[str, ...], lora: LoraOptions | None, fused: bool = True
    ) -> None:
        self.arch = arch
        self.kinds = (set(kinds) - {"layers"}) | (set(BLOCKS) if "layers" in kinds else set())
        self.model = model.eval().requires_grad_(False)
        self.layers = layers(model, arch.spec)
        self.arrangement: Arrangement | None = None
        self.lora: dict[str, nn.Parameter] = {}
        self.lora_shapes: dict[str, tuple[int, tuple[Dim, ...]]] = {}  # layer and dimensions of each LoRA weight
        self._tuners: list[BaseTunerLayer] = []
        self._observer: Observer | None = None
        self._observed = 0  # layers that the observer has seen in this forward pass
        self._dtype = self.model.dtype  # in which the model computes
        if lora is not None:
            self._add_lora(lora, fused)
        self.rigid = any(isinstance(module, QuantisedLinear) for module in model.modules())  # layers cannot be cut
        self._sites = list(self._attach())
        self._bases = dict(self._base_weights())
        self._repaired = False  # whether there are repaired weights
        self._role = Role({}, None, Widths.full(self.arch.dims))

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _add_lora(self, lora: LoraOptions, fused: bool) -> None:
        paths = lora.modules(self.arch)
        targets = [f"{self.arch.spec.layers}.{index}.{path}" for index in range(self.arch.dims.layers) for path in paths]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lora.seed)
            config: Any = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
            if fused:
                config._register_custom_module({nn.Linear: MaskedLoraLinear})
            inject_adapter_in_model(config, self.model)
        self._tuners = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self.lora = {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}
        for name, parameter in self.lora.items():  # trained in float32 whatever the base is in
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            index, _, path = name.removeprefix(f"{self.arch.spec.layers}.").partition(".")
            path, _, kind = path.partition(".lora_")
            rows, columns = self.arch.spec.block[path].axes("weight")
            self.lora_shapes[name] = (int(index), ((Axis.RANK,), columns) if kind.startswith("A") else (rows, (Axis.RANK,)))

    def _attach(self) -> Iterator[tuple[nn.Module, str, Site]]:
        """Makes modules apply masks; yields module, attribute and site."""
        ready: set[nn.Module] = set()
        for root, path, attribute, site in self._places():
            module = submodule(root, path)
            if module not in ready and not isinstance(module, MaskedLoraLinear):
                mask_hooks(module)
            ready.add(module)
            yield module, attribute, site
        for layer in self.layers[:-1]:
            layer.register_forward_hook(self._after_layer)

    def _places(self) -> Iterator[tuple[nn.Module, str, str, Site]]:
        """Where masks act: root, path in it, attribute and site."""
        arch, spec = self.arch, self.arch.spec
        for index, layer in enumerate(self.layers):
            for kind, axis in _INPUT_AXES.items():
                if kind in self.kinds:
                    for path in arch.linears(in_=axis):
                        yield layer, path, "in_mask", (kind, index)
            if "heads" in self.kinds:  # a norm over all heads must not see those that are gone
                for axis, kind in ((Axis.QUERY, "heads"), (Axis.KV, "groups")):
                    for path in arch.linears(out=axis):
                        norm = arch.norm_after(path)
                        if norm is not None and norm.axis is axis:
                            yield layer, path, "out_mask", (kind, index)
            for block in BLOCKS:
                last, output = spec.projection(block), spec.output(block)
                if "hidden" in self.kinds and (block not in self.kinds or last != output):
                    yield layer, last, "out_mask", ("hidden", 0)
                if block in self.kinds:
                    yield layer, output, "out_mask", (f"hidden and {block}" if last == output else block, index)
        if "hidden" in self.kinds:
            yield self.model, spec.embedding, "out_mask", ("hidden", 0)

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._observer is not None:
            self._observe(output[0] if isinstance(output, tuple) else output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # not part of a layer's graph, which all layers share
    def _observe(self, states: Tensor) -> None:
        assert self._observer is not None
        self._observer(self._observed, states)
        self._observed += 1

    def _base_weights(self) -> Iterator[tuple[str, BaseWeight]]:
        """The base model's parameters along axes that roles can do without, by stock name; codes stay whole."""
        for index in range(self.arch.dims.layers):
            for name, shape in self.arch.parameters.items():
                if not self.rigid and any(dim[0] in (Axis.QUERY, Axis.KV, Axis.INTERMEDIATE) for dim in shape):
                    parameter = self.parameter(index, name)
                    yield f"{self.arch.spec.layers}.{index}.{name}", BaseWeight(parameter, parameter.data, index, shape)

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward pass; masks must stay installed until it is done."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in self.layers:
            layer.training = True  # transformers checkpoints layers in training mode; children stay free of dropout
            if isinstance(getattr(layer, "dropout", None), float):
                object.__setattr__(layer, "dropout", 0.0)  # some layers drop by a rate of their own

    def shard(self, device: torch.device) -> None:
        """Parts the frozen weights of the layers among all processes (FSDP2) and puts the model on a device.

        A layer's weights are whole only while it runs. LoRA weights, embedding, head and final norm stay whole. Base weights
        can be neither read nor cut any more.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self._bases, self.rigid = {}, True
        own = set(self.lora.values())
        for layer in self.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=own & set(layer.parameters()))
        self.model.to(device)  # type: ignore[arg-type]

    def compile(self) -> None:
        """Compiles the decoder layers with torch.compile; all layers share the graphs of a role, whatever their widths."""
        config: Any = torch._dynamo.config
        config.force_parameter_static_shapes = config.force_nn_module_property_static_shapes = False
        config.recompile_limit = max(config.recompile_limit, 64)  # student and teacher, first layer or not, few heads
        for layer in self.layers:
            layer.compile()

    # -- roles --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the base model lives."""
        return self.model.device

    @property
    def widths(self) -> Widths:
        """Units computed in the present role."""
        return self._role.widths

    def keep_masks_with_weights(self) -> None:
        """From here on the present masks follow the model to another device or precision, before its next forward pass."""
        embedding = submodule(self.model, self.arch.spec.embedding)

        def follow(module: nn.Module, args: Any) -> None:
            for holder, attribute, _ in self._sites:
                mask = getattr(holder, attribute)
                if mask is not None and (mask.device, mask.dtype) != (embedding.weight.device, embedding.weight.dtype):
                    object.__setattr__(holder, attribute, mask.to(embedding.weight))

        self.model.register_forward_pre_hook(follow)

    def prepare(self, masks: Masks | None, lora: dict[str, Tensor] | None, repaired: bool = False) -> Role:
        """A role, ready to be played: everything on the device, in the order and at the widths of the arrangement.

        Args:
            masks: its masks, kept in the graph; None for the intact model.
            lora: its LoRA weights; None switches LoRA off.
            repaired: with the repaired weights, if there are any.
        """
        widths = Widths.full(self.arch.dims) if self.arrangement is None else self.arrangement.widths(masks)
        if lora is not None:
            lora = {name: self.cut_lora(name, lora[name], widths).to(self.device) for name in self.lora}
        return Role(self._scales(masks, widths), lora, widths, repaired)

    def _scales(self, masks: Masks | None, widths: Widths) -> dict[Site, Tensor]:
        """Mask values as the modules take them, by site."""
        if masks is None:
            return {}
        if self.arrangement is not None:
            masks = self.arrangement.masks(masks)
        dims = self.arch.dims
        each = dims.queries * dims.head_dim
        precise = torch.promote_types(torch.float32, self._dtype)  # products are rounded once, as folding rounds them
        tensors = {kind: t.to(self.device, precise) for kind, t in masks.tensors().items()}
        tensors["groups"] = masks.groups.to(self.device, precise)

        def scale(what: str, index: int) -> Tensor:
            if what == "hidden":
                return tensors["hidden"]
            if what == "intermediate":
                return tensors["intermediate"][index, : widths.intermediate[index]]
            if what == "heads":
                return tensors["heads"][index].flatten().repeat_interleave(dims.head_dim)[: each * widths.heads[index]]
            if what == "groups":
                return tensors["groups"][index].repeat_interleave(dims.head_dim)[: dims.head_dim * widths.heads[index]]
            value = tensors[what.removeprefix("hidden and ")][index]
            return tensors["hidden"] * value if what.startswith("hidden and ") else value.expand(dims.hidden)

        sites = dict.fromkeys(site for _, _, site in self._sites)  # in order: gradients are summed alike in every process
        return {site: scale(*site).to(self._dtype) for site in sites}

    def install(self, role: Role) -> None:
        """Puts a role's masks and widths in place; LoRA weights stay."""
        for module, attribute, site in self._sites:
            object.__setattr__(module, attribute, role.scales.get(site))
        if (role.widths, role.repaired) != (self._role.widths, self._role.repaired):
            for base in self._bases.values():
                base.play(self.arrangement, role.widths, role.repaired)
        self._role = role

    def set_masks(self, masks: Masks | None) -> None:
        """Installs masks (kept in the graph), or none; the student's LoRA and repaired weights stay."""
        self.install(self.prepare(masks, None, repaired=masks is not None and self._repaired))

    @contextmanager
    def playing(self, role: Role) -> Iterator[None]:
        """The model in a role inside the block, the student's again after it; nothing is copied."""
        before, mine = self._role, [p.data for p in self.lora.values()]
        try:
            self.install(role)
            if role.lora is None:
                for tuner in self._tuners:
                    tuner.enable_adapters(False)
            else:
                for name, parameter in self.lora.items():
                    parameter.data = role.lora[name]
            yield
        finally:
            self.install(before)
            if role.lora is None:
                for tuner in self._tuners:
                    tuner.enable_adapters(True)
            for parameter, data in zip(self.lora.values(), mine, strict=True):
                parameter.data = data

    @contextmanager
    def role(self, masks: Masks | None, lora: dict[str, Tensor] | None) -> Iterator[None]:
        """`prepare` and `playing` in one."""
        with self.playing(self.prepare(masks, lora)):
            yield

    def forward(self, input_ids: Tensor, observer: Observer | None = None) -> Tensor:
        """Runs the decoder in the present role, without the head.

        Args:
            input_ids: [batch, tokens], int64.
            observer: called with the hidden states [batch, tokens, hidden] after each layer but the last, as they come.

        Returns:
            Hidden states as the head takes them, [batch, tokens, hidden]: after the final norm, and divided by the model's
            logits scaling where it has one.
        """
        decoder = getattr(self.model, self.model.base_model_prefix)
        self._observer, self._observed = observer, 0
        try:
            with self.autocast():
                states: Tensor = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
                return states if self.arch.logits_scaling == 1.0 else states / self.arch.logits_scaling
        finally:
            self._observer = None

    def autocast(self) -> torch.autocast:
        """The context in which a half-precision model computes; it changes nothing in others."""
        return half_autocast(self.device, self._dtype)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Inside the block, layers run without what `compile` made of them, so that hooks see their parts."""
        compiled = [layer._compiled_call_impl for layer in self.layers]
        try:
            for layer in self.layers:
                layer._compiled_call_impl = None
            yield
        finally:
            for layer, made in zip(self.layers, compiled, strict=True):
                layer._compiled_call_impl = made

    @property
    def head(self) -> nn.Linear:
        """The language-model head."""
        head = submodule(self.model, self.arch.spec.head)
        assert isinstance(head, nn.Linear)
        return head

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocab] in the present role."""
        return self.arch.capped(self.head(self.forward(input_ids)))

    # -- LoRA weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lora_copy(self) -> dict[str, Tensor]:
        """A copy of the LoRA weights on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.lora.items()}

    @torch.no_grad()
    def load_lora(self, tensors: dict[str, Tensor]) -> None:
        """Copies LoRA weights in."""
        if self.lora:
            torch._foreach_copy_(list(self.lora.values()), [tensors[name] for name in self.lora])

    def cut_lora(self, name: str, tensor: Tensor, widths: Widths) -> Tensor:
        """A LoRA weight (or its optimiser moment) at widths of the arrangement; itself while there is none."""
        layer, shape = self.lora_shapes[name]
        return tensor if self.arrangement is None else self.arrangement.cut(tensor, shape, layer, widths)

    def spread_lora(self, name: str, tensor: Tensor, widths: Widths) -> Tensor:
        """The inverse of `cut_lora`; what was left out is zero."""
        layer, shape = self.lora_shapes[name]
        return tensor if self.arrangement is None else self.arrangement.spread(tensor, shape, layer, widths)

    # -- repaired weights ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def repair(self, weights: dict[str, Tensor], share: float = 1.0) -> None:
        """Gives roles that are `repaired` weights of their own; the base stays for the others.

        Args:
            weights: by stock name, in whole shape; of parameters along heads or intermediate channels, beside those given
                before.
            share: of the way to them from the base's own.
        """
        assert self.arrangement is None
        for name, weight in weights.items():
            base = self._bases[name]
            precise = torch.promote_types(base.full.dtype, torch.float32)
            whole = weight.to(base.full.device, precise)
            base.repaired = torch.lerp(base.full.detach().to(precise), whole, share).to(base.full.dtype)
            base.play(None, self._role.widths, self._role.repaired)
        self._repaired = self._repaired or bool(weights)

    def repaired_weights(self) -> dict[str, Tensor]:
        """Those that `repair` gave, by stock name, in whole shape, on the CPU."""
        assert self.arrangement is None
        return {name: base.repaired.cpu() for name, base in self._bases.items() if base.repaired is not None}

    def forget_repair(self) -> None:
        """Takes all repaired weights away."""
        for base in self._bases.values():
            base.repaired = None
            base.play(self.arrangement, self._role.widths, False)
        self._repaired = False
        self._role = replace(self._role, repaired=False)

    # -- order of units -----------------------------------------------------------------------------------------------

    def arrange(self, arrangement: Arrangement) -> None:
        """Puts the base weights in an order, in place; from here on roles run at the widths that they need.

        The caller cuts the student's LoRA weights.
        """
        assert self.arrangement is None
        self.install(Role({}, None, Widths.full(self.arch.dims)))
        self.arrangement = arrangement
        for base in self._bases.values():
            for data in base.every:
                data.copy_(arrangement.cut(data, base.shape, base.layer, Widths.full(self.arch.dims)))

    def restore(self) -> None:
        """Puts the base weights back as they were, bit for bit, and undoes `compile`."""
        if self.arrangement is not None:
            self.install(Role({}, None, Widths.full(self.arch.dims)))
            for base in self._bases.values():
                for data in base.every:
                    data.copy_(self.arrangement.spread(data, base.shape, base.layer, Widths.full(self.arch.dims)))
            self.arrangement = None
        for layer in self.layers:
            layer._compiled_call_impl = None

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Forward passes in another precision inside the block: each layer's weights are cast while it runs, no longer.

        Masks have to be installed inside the block.
        """
        hooks, own, before = [], self._dtype, self._role
        held: dict[nn.Parameter, Tensor] = {}

        def cast(module: nn.Module, args: Any) -> None:
            for parameter in module.parameters():
                held[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)

        def back(module: nn.Module, args: Any, output: Any) -> None:
            for parameter in module.parameters():
                parameter.data = held.pop(parameter)

        scale = self.arch.embedding_scale(self.arch.dims.hidden, dtype)

        def embedded(module: nn.Embedding, args: Any, output: Tensor) -> Tensor:
            rows = nn.functional.embedding(args[0], module.weight)
            return rows.to(dtype) * scale  # before its mask; the rows are exact, the product in the model's precision is not

        spec = self.arch.spec
        try:
            self._dtype = dtype
            hooks.append(submodule(self.model, spec.embedding).register_forward_hook(embedded, prepend=True))
            for module in (*self.layers, submodule(self.model, spec.final_norm)):
                hooks.append(module.register_forward_pre_hook(cast))
                hooks.append(module.register_forward_hook(back))
            yield
        finally:
            self._dtype = own
            for hook in hooks:
                hook.remove()
            for parameter, data in held.items():  # an error came in mid-layer
                parameter.data = data
            self.install(before)

    def release(self) -> None:
        """Gives the memory of all weights back; the model cannot be used any more."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        for module in self.model.modules():
            if isinstance(module, QuantisedLinear):
                module.release()
        self._bases = {}

    # -- for compaction -----------------------------------------------------------------------------------------------

    def lora_pair(self, layer: int, path: str) -> tuple[Tensor, Tensor] | None:
        """A [rank, in] and scaling B [out, rank] (float64), whose product LoRA adds to a module's weight; or None."""
        module = submodule(self.layers[layer], path)
        if not isinstance(module, BaseTunerLayer):
            return None
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[attr-defined]
        return a.detach(), b.detach().double() * module.scaling["default"]  # type: ignore[attr-defined]

    def weight(self, layer: int, name: str) -> Tensor:
        """The student's frozen parameter `name` of a layer, in whole shape: repaired, or else the intact one."""
        base = self._bases.get(f"{self.arch.spec.layers}.{layer}.{name}")
        repaired = None if base is None else base.repaired
        return self.parameter(layer, name).detach() if repaired is None else repaired

    def parameter(self, layer: int, name: str) -> nn.Parameter:
        """The parameter `name` of a layer, which holds what the present role computes with; made anew where it is in codes."""
        path, _, kind = name.rpartition(".")
        module = submodule(self.layers[layer], path)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return getattr(base, kind)  # type: ignore[no-any-return]
