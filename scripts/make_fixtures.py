"""Makes small random checkpoints, and what transformers computes with them.

`python -m scripts.make_fixtures` writes `tests/fixtures/`; it needs torch and
transformers, the extra `peers`. The tests that read the files need neither.
"""

# pyright: reportMissingImports=false
# PyTorch and transformers are not among what is installed for development.

import argparse
import json
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from ._fixture_cases import (
    Case,
    CASES,
    LOGITS_EVERY,
    NUM_NEW_TOKENS,
    PROMPT_LENS,
    ROPE_CASES,
    ROPE_LENGTH,
    SIZES,
    VOCAB_SIZE,
)


ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
EXPECTED = "expected.safetensors"
# A token must win by this much, so that rounding cannot choose another.
MIN_MARGIN = 0.005
# Of the last norm, so that logits are far apart.
FINAL_GAIN = 4.0
MAX_SEEDS = 200


def make(name: str, directory: pathlib.Path) -> str:
    """Makes one checkpoint with what is expected of it.

    **Arguments:**

    - `name`: of a case.
    - `directory`: where to; the folder `name` in it is replaced.

    **Returns:**

    A line that says what was made.
    """
    case, folder = CASES[name], directory / name
    for seed in range(case.seed, case.seed + MAX_SEEDS):
        rng = np.random.default_rng((zlib.crc32(name.encode()), seed))
        shutil.rmtree(folder, ignore_errors=True)
        save(case, rng, folder)
        model = load(folder)
        prompts = [rng.integers(3, VOCAB_SIZE, length) for length in PROMPT_LENS]
        rows = []
        for prompt in prompts:
            rows.append(continued(model, prompt, NUM_NEW_TOKENS))
            if not _is_telling(*rows[-1]):
                break
        else:
            save_file(_expected(prompts, rows), folder / EXPECTED)
            margin = min(_margin(logits) for _, logits in rows)
            return f"{name}: seed {seed}, margin {margin:.3f}"
    raise RuntimeError(f"{name}: none of {MAX_SEEDS} seeds is fit")


def make_rope(directory: pathlib.Path) -> str:
    """Makes what is expected of the kinds of rotary positions, of the same weights."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB_SIZE, ROPE_LENGTH)
    expected = {"tokens": tokens.astype(np.int32)}
    for kind, (name, changes) in ROPE_CASES.items():
        with tempfile.TemporaryDirectory() as changed:
            copy = pathlib.Path(changed) / name
            change_config(directory / name, copy, changes)
            model = load(copy)
            # Frequencies that follow the length are those of each token's own.
            step = 1 if kind == "dynamic" else ROPE_LENGTH
            expected[kind] = in_steps(model, tokens, step)
    save_file(expected, directory / "rope.safetensors")
    return f"rope: {', '.join(ROPE_CASES)}"


def change_config(
    source: pathlib.Path, target: pathlib.Path, changes: Mapping[str, Any]
) -> None:
    """Copies a checkpoint with other values in its `config.json`."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: pathlib.Path) -> Any:
    """A checkpoint as transformers loads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def in_steps(model: Any, tokens: np.ndarray, step: int) -> np.ndarray:
    """The logits after each token, read `step` at a time."""
    cache = transformers.DynamicCache(config=model.config)
    logits = []
    for start in range(0, len(tokens), step):
        part = torch.as_tensor(tokens[None, start : start + step], dtype=torch.long)
        out = model(part, past_key_values=cache, use_cache=True)
        logits.append(out.logits[0].numpy())
    return np.concatenate(logits)


@torch.no_grad()
def continued(
    model: Any, prompt: np.ndarray, num_new: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable tokens after a prompt, and the logits after each token of the
    prompt and of those but the last.
    """
    cache = transformers.DynamicCache(config=model.config)
    part, tokens, logits = torch.as_tensor(prompt[None]), [], []
    for _ in range(num_new):
        out = model(part, past_key_values=cache, use_cache=True).logits[0]
        logits.append(out.numpy())
        tokens.append(int(out[-1].argmax()))
        part = torch.as_tensor([tokens[-1:]])
    return np.asarray(tokens), np.concatenate(logits)


def save(case: Case, rng: np.random.Generator, folder: pathlib.Path) -> None:
    """Saves a random checkpoint of a case, in bfloat16."""
    config = getattr(transformers, case.config)(**{**SIZES, **case.options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = _drawn(name, tuple(weight.shape), case, rng)
            if "norm" in name:
                drawn = (1 + drawn) * (FINAL_GAIN if name == "model.norm.weight" else 1)
                drawn -= "gemma" in config.model_type
            weight.copy_(torch.as_tensor(drawn, dtype=torch.float32))
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _drawn(
    name: str, shape: tuple[int, ...], case: Case, rng: np.random.Generator
) -> np.ndarray:
    """Weights large enough that each of them matters."""
    drawn = rng.standard_normal(shape)
    if "experts" in name:
        return np.zeros(shape)
    if "embed" in name:
        return case.embed_scale * drawn
    if "sinks" in name:
        return drawn
    if len(shape) == 1:
        return 0.3 * drawn
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
    return gain * drawn / np.sqrt(shape[1])


def _is_telling(tokens: np.ndarray, logits: np.ndarray) -> bool:
    """Whether no choice was close, and the end is no short cycle."""
    late = set(tokens[NUM_NEW_TOKENS // 2 :].tolist())
    return _margin(logits) >= MIN_MARGIN and len(late) >= NUM_NEW_TOKENS // 5


def _margin(logits: np.ndarray) -> float:
    """By how much the chosen tokens won, at the least."""
    second, best = np.sort(logits[-NUM_NEW_TOKENS:], axis=-1)[:, -2:].T
    return float((best - second).min())


def _expected(
    prompts: Sequence[np.ndarray], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    expected = {}
    for i, (prompt, (tokens, logits)) in enumerate(zip(prompts, rows, strict=True)):
        expected[f"prompt_{i}"] = prompt.astype(np.int32)
        expected[f"tokens_{i}"] = tokens.astype(np.int32)
        expected[f"prompt_logits_{i}"] = logits[: len(prompt)]
        expected[f"logits_{i}"] = logits[len(prompt) - 1 :][::LOGITS_EVERY]
    # The file is written as memory is.
    return {name: np.ascontiguousarray(x) for name, x in expected.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes all fixtures, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="which; all if none is named")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT, help="where to")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    unknown = set(options.names) - {*CASES, "rope"}
    if unknown:
        parser.error(f"no such fixture: {', '.join(sorted(unknown))}")
    names = options.names or [*CASES, "rope"]
    for name in names:
        if name == "rope":
            print(make_rope(options.output), flush=True)
        else:
            print(make(name, options.output), flush=True)


if __name__ == "__main__":
    main()
