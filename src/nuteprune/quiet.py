"""What the libraries underneath need not say to users."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Takes away their progress bars, ours being rich's, and notes on files and kernels that they lack."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # peft imports them where they are
        logging.getLogger(name).setLevel(logging.ERROR)
