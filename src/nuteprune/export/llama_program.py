"""llama.cpp itself, through its Python package (llama-cpp-python): quantisation, and a look at a file as it is used.

Each function runs in a process of its own: an assertion of the program ends the process that it is in.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nuteprune.errors import ExportError, MeasurementError
from nuteprune.measuring import in_fresh_process

PACKAGE = "llama_cpp"


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def quantise(source: Path, target: Path, outtype: str) -> None:
    """Writes a quantised copy of a GGUF file.

    Args:
        source: a file with float weights.
        target: the file to write.
        outtype: llama.cpp's name of the type in small letters, such as q8_0 or q4_k_m.

    Raises:
        ExportError: llama.cpp could not.
    """
    code, said = _checked(f"quantise {source.name} to {outtype}", _quantise, str(source), str(target), outtype)
    if code != 0:
        raise ExportError(f"llama.cpp could not quantise to {outtype}: {said or f'code {code}'}. Try --outtype f16 or q8_0.")


def logits(path: Path, ids: Sequence[int], threads: int | None = None) -> np.ndarray[Any, Any]:
    """Logits [tokens, vocab], float32, of a file for token ids; flash attention off, keys and values kept in float32.

    In float16, in which llama.cpp keeps them by itself, they alone move logits by about 0.01. Weights are used as they lie in
    the file.

    Raises:
        ExportError: llama.cpp does not load or run the file.
    """
    return _checked(f"run {path.name}", _logits, str(path), list(ids), threads)  # type: ignore[no-any-return]


def continuations(path: Path, prompts: Sequence[Sequence[int]], tokens: int, threads: int | None = None) -> list[list[int]]:
    """Greedy continuations of prompts, token ids, each of `tokens` tokens; no token ends them. As exact as `logits`.

    Raises:
        ExportError: llama.cpp does not load or run the file.
    """
    return _checked(f"run {path.name}", _continuations, str(path), [list(p) for p in prompts], tokens, threads)  # type: ignore[no-any-return]


def tokenised(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by the file's own tokenizer, special tokens added as it says.

    Raises:
        ExportError: llama.cpp does not load the file.
    """
    return _checked(f"run {path.name}", _tokenised, str(path), list(texts))  # type: ignore[no-any-return]


def _checked(what: str, function: Any, *args: Any) -> Any:
    """Calls a function in a process of its own; an error says what llama.cpp does not do."""
    try:
        return in_fresh_process(function, *args)[0]
    except (MeasurementError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        raise ExportError(f"llama.cpp does not {what}: {last}") from error


_errors: list[str] = []  # what llama.cpp said was wrong, in this process
_callback: Any = None  # kept alive for llama.cpp


def _listen() -> None:
    """Keeps llama.cpp's messages to itself, and its errors for ours."""
    import llama_cpp

    global _callback
    if _callback is None:

        def heard(level: int, text: bytes, data: Any) -> None:
            if level == _ERROR:
                _errors.append(text.decode("utf-8", "replace").strip())

        _callback = llama_cpp.llama_log_callback(heard)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


_ERROR = 4  # ggml's number of the level


def open_model(path: str, context: int, threads: int | None = None, exact: bool = False, **options: Any) -> Any:
    """A llama_cpp.Llama with flash attention off, silent.

    Args:
        path: a GGUF file.
        context: tokens that it can hold.
        threads: CPU threads; all cores if None.
        exact: keep keys and values in float32, and use weights as they lie in the file, not repacked for this processor.
        **options: more of its arguments.

    Raises:
        RuntimeError: it does not load; the text is what llama.cpp said.
    """
    import llama_cpp

    _listen()
    cores = threads or os.cpu_count()
    try:
        with _as_they_lie() if exact else nullcontext():
            return llama_cpp.Llama(
                path,
                n_ctx=context,
                n_batch=min(context, 512),
                n_threads=cores,
                n_threads_batch=cores,
                flash_attn=False,
                verbose=False,
                **(_FLOAT32 if exact else {}),
                **options,
            )
    except (ValueError, AssertionError) as error:
        raise RuntimeError(" ".join([str(error), *_errors[-2:]])) from error


_FLOAT32 = {"type_k": 0, "type_v": 0}  # ggml's number of it


@contextmanager
def _as_they_lie() -> Iterator[None]:
    """Models opened meanwhile use their weights as they lie in the file.

    By itself llama.cpp repacks quantised ones for the processor. Where that has AMX, version 0.3.36 of the package ends with a
    segmentation fault or an illegal instruction when it computes with them (seen on a Xeon; ggml-org/llama.cpp issue 20824
    is another such end), which says nothing of the file. The package has no argument for it, so its default is changed.
    """
    binding = importlib.import_module("llama_cpp.llama_cpp")
    default = binding.llama_model_default_params

    def plain() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    binding.llama_model_default_params = plain  # type: ignore[attr-defined]
    try:
        yield
    finally:
        binding.llama_model_default_params = default  # type: ignore[attr-defined]


def _logits(path: str, ids: list[int], threads: int | None) -> np.ndarray[Any, Any]:
    model = open_model(path, max(len(ids), 8), threads, exact=True, logits_all=True)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def _continuations(path: str, prompts: list[list[int]], tokens: int, threads: int | None) -> list[list[int]]:
    model = open_model(path, max(map(len, prompts)) + tokens, threads, exact=True)
    made = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        here: list[int] = []
        for _ in range(tokens):
            here.append(int(np.argmax(last_logits(model))))
            model.eval(here[-1:])
        made.append(here)
    return made


def last_logits(model: Any) -> np.ndarray[Any, Any]:
    """Logits [vocab], float32, after the last token evaluated by a llama_cpp.Llama; valid until the next one."""
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),))


def _tokenised(path: str, texts: list[str]) -> list[list[int]]:
    model = open_model(path, 8, vocab_only=True)
    return [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]


def _quantise(source: str, target: str, outtype: str) -> tuple[int, str]:
    """llama.cpp's code, 0 for success, and what it said was wrong."""
    import llama_cpp

    _listen()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return int(code), " ".join(_errors[-2:])
