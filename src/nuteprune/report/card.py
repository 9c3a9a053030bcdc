"""The model card: the facts of a run as the README.md of its model folder."""

from __future__ import annotations

from typing import Any

import yaml

from nuteprune import __version__
from nuteprune.report.facts import RunFacts


def load_lines(path: str, own_code: bool) -> str:
    """The Python that loads a model.

    Args:
        path: its folder.
        own_code: whether the folder carries code of its own.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{path}"{trust})"""


def model_card(facts: RunFacts) -> str:
    """The card of a finished run, Markdown with a YAML head.

    Args:
        facts: of a run whose figures and masks are known.
    """
    f, masks = facts.figures, facts.masks
    assert f is not None
    assert masks is not None
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["nuteprune", "pruned", "structured-pruning"]}
    if facts.hub_id is not None:
        head |= {"base_model": facts.hub_id}
    cells = ([line.name.replace("|", "\\|"), line.dense, line.pruned, line.change] for line in facts.lines())
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    notes = "\n".join(
        [f"- {line.name}: {line.note}" for line in facts.lines() if line.note] + [f"- {x}" for x in facts.left_out]
    )
    other = (
        'or, without remote code, `from nuteprune import load; model, tokenizer = load("PATH")`.'
        if f.own_code
        else f"All layers are alike: a stock `{f.model_class}`, without code of its own."
    )
    counts = masks.counts()
    place = {layer: str(number) for number, layer in enumerate(counts.layers)}
    lost = " Layers with nothing left are not in the checkpoint." if len(place) < len(counts.groups) else ""
    rows = "\n".join(f"| {row[0]} | {place.get(row[0], '-')} | {' | '.join(map(str, row[1:]))} |" for row in facts.left())
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {facts.title}

Made by [nuteprune](https://pypi.org/project/nuteprune/) {__version__}: {facts.made_by()} Sparsity counts the
parameters of the decoder blocks; embeddings and head are not pruned in number of rows.

| | dense | pruned | |
|---|---|---|---|
{table}

{notes}

Largest logit difference between this checkpoint and the masked model it was trained as, on real text and over the whole
vocabulary: {f.equality.exact:.2e} in float64 ({f.equality.exact_tokens:,} tokens), {f.equality.largest:.2e} in float32
({f.equality.tokens:,} tokens; what rounding makes of logits of up to {f.equality.scale:.0f}).

## Load

```python
{load_lines("PATH", f.own_code)}
```

{other}

## What is left

Hidden size {counts.hidden}.{lost}

| dense layer | layer | KV groups | query heads | intermediate |
|---|---|---|---|---|
{rows}

## Recipe

{f.tokens:,} training tokens in {f.seconds / 60:.1f} minutes of steps. {facts.teaching_line()}

```yaml
{yaml.safe_dump(facts.recipe(), sort_keys=False).strip()}
```
"""
