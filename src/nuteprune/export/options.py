"""What `nuteprune export` takes."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from nuteprune.errors import ConfigError
from nuteprune.export import llama_program
from nuteprune.models import DTYPES

FORMATS = ("hf", "hf-uniform", "gguf", "adapter")
PLAIN = ("f32", "f16", "bf16")
# Quantised types: ggml's name of what most weights get.
QUANTISED = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}
K_TYPES = ("q4_k_m", "q5_k_m", "q6_k")  # those in blocks of 256
WITHOUT_LLAMA = ("q8_0", "q4_0")  # quantised types that the gguf package writes too
OUTTYPES = (*PLAIN, *QUANTISED)
SHARD = "5GB"


@dataclass(frozen=True)
class ExportOptions:
    """What `nuteprune export` takes.

    Attributes:
        format: hf (a width for each layer), hf-uniform (a stock class), gguf or adapter.
        sparsity: sparsities of the models wanted; empty for the pruned model.
        out: file or folder to write; a folder for several. RUN/export by default.
        outtype: type of the weights in a GGUF file; f16 by default.
        dtype: precision of a Hugging Face folder: auto, float32, bfloat16 or float16; that of the run by default.
        max_shard_size: largest safetensors file, such as 5GB.
        tokenizer_pre: llama.cpp's name of the way to split text, for a tokenizer that is not recognised.
        device: where weights are computed.
    """

    format: str = "hf"
    sparsity: tuple[float, ...] = ()
    out: Path | None = None
    outtype: str | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    tokenizer_pre: str | None = None
    device: str = "auto"

    def check(self) -> None:
        """Refuses what is wrong by itself.

        Raises:
            ConfigError: names the option, the value and what is allowed.
        """
        if self.format not in FORMATS:
            raise ConfigError(f"--format got {self.format!r}; allowed are {', '.join(FORMATS)}.")
        for value in self.sparsity:
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"--sparsity got {value:g}; allowed is a share from 0 (the intact model) to below 1.")
        folders = self.format in ("hf", "hf-uniform")
        for option, given, fits, where in (
            ("--outtype", self.outtype, self.format == "gguf", "gguf"),
            ("--tokenizer-pre", self.tokenizer_pre, self.format == "gguf", "gguf"),
            ("--dtype", self.dtype, folders, "hf and hf-uniform"),
            ("--max-shard-size", self.max_shard_size, folders, "hf and hf-uniform"),
        ):
            if given is not None and not fits:
                raise ConfigError(f"{option} is for --format {where}, not for {self.format}; leave it out.")
        if self.outtype is not None and self.outtype not in OUTTYPES:
            raise ConfigError(f"--outtype got {self.outtype!r}; allowed are {', '.join(OUTTYPES)}.")
        if self.dtype is not None and self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"--dtype got {self.dtype!r}; allowed are auto, {', '.join(DTYPES)}.")
        if self.outtype in set(QUANTISED) - set(WITHOUT_LLAMA) and not llama_program.installed():
            raise ConfigError(
                f"--outtype {self.outtype} is made by llama.cpp, whose package is not installed; run: "
                f"pip install 'nuteprune[gguf]'. Without it there are {', '.join((*PLAIN, *WITHOUT_LLAMA))}."
            )
        if self.format == "gguf" and importlib.util.find_spec("gguf") is None:
            raise ConfigError(
                "--format gguf needs the gguf package; run: pip install gguf, or 'nuteprune[gguf]' for llama.cpp too."
            )
        parse_size(self.max_shard_size or SHARD)


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB or 1.5GiB.

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ") if found else 0.0
    if size < 1:
        raise ConfigError(f"--max-shard-size got {text!r}; give a size such as 5GB or 500MB.")
    return int(size)
