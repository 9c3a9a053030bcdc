"""What a role of the one model is made of: masks by site, LoRA weights, and the part of each frozen weight that it uses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nuteprune.arch import Arch, Dim, Linear
from nuteprune.arrangement import Arrangement, Widths
from nuteprune.errors import ConfigError

Site = tuple[str, int]  # what is multiplied there, and the layer; 0 where all layers share it


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
class Role:
    """What the model plays: a student or teacher.

    Attributes:
        scales: mask values by site, as modules take them; empty for no masks.
        lora: LoRA weights by name; None for none (in `playing`).
        widths: units computed in each layer.
        repaired: whether repaired weights take the place of the base's (`MaskedModel.repair`).
    """

    scales: dict[Site, Tensor]
    lora: dict[str, Tensor] | None
    widths: Widths
    repaired: bool = False


@dataclass
class BaseWeight:
    """A frozen parameter of a layer that roles can use in part, or repaired.

    Attributes:
        parameter: the module's parameter.
        full: its whole data.
        layer: layer index.
        shape: its dimensions.
        repaired: whole data in place of `full` in repaired roles, or None.
    """

    parameter: nn.Parameter
    full: Tensor
    layer: int
    shape: tuple[Dim, ...]
    repaired: Tensor | None = None

    @property
    def every(self) -> list[Tensor]:
        """All whole data there is."""
        return [self.full] if self.repaired is None else [self.full, self.repaired]

    def play(self, arrangement: Arrangement | None, widths: Widths, repaired: bool) -> None:
        """Lets the module see the first units only, of the repaired data if asked for and there; a view."""
        data = self.repaired if repaired and self.repaired is not None else self.full
        for position, dim in enumerate(self.shape):
            length = None if arrangement is None else arrangement.length(dim, self.layer, widths)
            data = data if length is None else data.narrow(position, 0, length)
        self.parameter.data = data
