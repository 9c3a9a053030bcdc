"""The model card: recipe, figures, protocol, and how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nuteprune import __version__
from nuteprune.config import PruneConfig
from nuteprune.evaluate import Perplexity
from nuteprune.export.hf import Equality
from nuteprune.masks import Masks


@dataclass(frozen=True)
class Figures:
    """What was measured of a run.

    Attributes:
        blocks_before, blocks_after: parameters of the decoder blocks.
        total_before, total_after: parameters of the whole model.
        file_bytes: size of the safetensors files.
        equality: comparison of compact and masked model, float32.
        exact: the same in float64, where rounding plays no part; None for large models.
        dense, pruned: perplexity before and after, or None where the text was too short to hold any out.
        tokens: training tokens.
        seconds: time in training steps.
    """

    blocks_before: int
    blocks_after: int
    total_before: int
    total_after: int
    file_bytes: int
    equality: Equality
    exact: Equality | None
    dense: Perplexity | None
    pruned: Perplexity | None
    tokens: int
    seconds: float

    @property
    def block_sparsity(self) -> float:
        """Share of block parameters removed."""
        return 1 - self.blocks_after / self.blocks_before

    @property
    def total_sparsity(self) -> float:
        """Share of all parameters removed."""
        return 1 - self.total_after / self.total_before

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "blocks": {"before": self.blocks_before, "after": self.blocks_after, "removed": self.block_sparsity},
            "model": {"before": self.total_before, "after": self.total_after, "removed": self.total_sparsity},
            "file_bytes": self.file_bytes,
            "largest_logit_difference": self.equality.largest,
            "largest_logit_difference_float64": self.exact.largest if self.exact else None,
            "compared_tokens": self.equality.tokens,
            "perplexity_before": self.dense.to_dict() if self.dense else None,
            "perplexity_after": self.pruned.to_dict() if self.pruned else None,
            "training_tokens": self.tokens,
            "training_seconds": self.seconds,
        }


def model_card(base: str, config: PruneConfig, figures: Figures, masks: Masks, dtype: torch.dtype) -> str:
    """The README.md of a model folder, Markdown with a YAML head."""
    heads, channels, hidden = masks.counts()
    f = figures
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["nuteprune", "pruned", "structured-pruning"]}
    if "/" in base and not base.startswith(("/", ".")):
        head |= {"base_model": base}
    rows = "\n".join(f"| {i} | {h} | {c} |" for i, (h, c) in enumerate(zip(heads, channels, strict=True)))
    perplexities = ""
    if f.dense is not None and f.pruned is not None:
        perplexities = f"\n| perplexity | {f.dense.perplexity:.2f} | {f.pruned.perplexity:.2f} |"
        perplexities += f" x {f.pruned.perplexity / f.dense.perplexity:.3f} |"
    protocol = f"\nPerplexity: {f.pruned.protocol}.\n" if f.pruned is not None else ""
    exact = f"; {f.exact.largest:.2e} in float64" if f.exact is not None else ""
    options = {k: v for k, v in config.to_dict().items() if k not in ("model", "out")}
    options["data"] = [Path(d).name if Path(d).exists() else d for d in config.data]  # no folders of this machine
    recipe = yaml.safe_dump(options, sort_keys=False)
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {base.rstrip("/").rpartition("/")[2]}, {100 * f.block_sparsity:.2f} % of its blocks pruned

Made by [nuteprune](https://pypi.org/project/nuteprune/) {__version__}: structured pruning with numerous teachers
(arXiv 2402.09773). Sparsity counts the parameters of the decoder blocks; embeddings and head are not pruned in number
of rows.

| | dense | pruned | |
|---|---|---|---|
| block parameters | {f.blocks_before:,} | {f.blocks_after:,} | -{100 * f.block_sparsity:.2f} % |
| all parameters | {f.total_before:,} | {f.total_after:,} | -{100 * f.total_sparsity:.2f} % |{perplexities}
{protocol}
Largest logit difference between this checkpoint and the masked model it was trained as: {f.equality.largest:.2e}
(float32{exact}, {f.equality.tokens:,} tokens of real text, whole vocabulary).
The weights are stored in {str(dtype).removeprefix("torch.")}, {f.file_bytes / 1e6:.1f} MB.

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

or, without remote code, `from nuteprune import load; model, tokenizer = load("PATH")`.

## What is left

Hidden size {hidden}.

| layer | KV groups | intermediate |
|---|---|---|
{rows}

## Recipe

{f.tokens:,} training tokens in {f.seconds / 60:.1f} minutes of steps.

```yaml
{recipe.strip()}
```
"""
