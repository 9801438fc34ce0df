"""Writes the golden files: tiny models as transformers saves them, and what it computes with them.

    python tests/golden/make.py          (needs transformers and torch; written with 5.23 and 2.13)

For each family a folder with config.json, model.safetensors and expected.safetensors:

    tokens [B, T] int32     texts of several lengths, padded on the right with 0
    lengths [B] int32       how many tokens of each are real
    logits [B, T, V]        float32, of eager attention; 0 at padding
    greedy [B, S] int32     the greedy continuation of each text, every token from a whole forward pass

And the folder of a tiny sentence encoder, whose expected.safetensors has

    vectors [N, H] float32  of encoders.TEXTS: the last layer's means over each text's tokens, of length 1
"""

import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import encoders  # noqa: E402
import huggingface_models  # noqa: E402

LENGTHS = np.array([18, 11, 4], np.int32)
STEPS = 16
# Two tokens whose logits are closer than this could change places by rounding.
CLEAR = 1e-3


def greedy(network, text: np.ndarray) -> tuple[np.ndarray, float]:
    """The continuation, and by how much its closest choice was made."""
    closest = np.inf
    for _ in range(STEPS):
        last = huggingface_models.logits(network, text[None])[0, -1]
        second, first = np.sort(last)[-2:]
        closest = min(closest, first - second)
        text = np.append(text, last.argmax())
    return text[-STEPS:].astype(np.int32), closest


def expected(network) -> tuple[dict[str, np.ndarray], float]:
    """What the network computes, and by how much its closest greedy choice was made."""
    tokens = np.random.default_rng(5).integers(3, 61, (len(LENGTHS), LENGTHS.max()))
    real = np.arange(tokens.shape[1]) < LENGTHS[:, None]
    tokens = np.where(real, tokens, 0).astype(np.int32)
    logits = huggingface_models.logits(network, tokens, LENGTHS)
    continued = [greedy(network, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True)]
    arrays = {
        "tokens": tokens,
        "lengths": LENGTHS,
        "logits": np.where(real[..., None], logits, 0).astype(np.float32),
        "greedy": np.stack([row for row, _ in continued]),
    }
    return arrays, min(gap for _, gap in continued)


def main() -> None:
    for family in huggingface_models.GOLDEN:
        # Of a dozen networks whose greedy choices are clear, the one that says the most different things.
        best, seed = 0, 0
        for candidate in range(12):
            arrays, closest = expected(huggingface_models.build(family, candidate))
            different = len(set(arrays["greedy"].ravel().tolist()))
            if closest > CLEAR and different > best:
                best, seed = different, candidate
        network = huggingface_models.build(family, seed)
        arrays, closest = expected(network)
        folder = HERE / family
        network.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        save_file(arrays, folder / "expected.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{family}: seed {seed}, {size} bytes, {best} different tokens, closest choice {closest:.1e}")
    encoders.write(HERE / "encoder", seed=0)
    vectors = encoders.expected(HERE / "encoder", encoders.TEXTS)
    save_file({"vectors": vectors}, HERE / "encoder" / "expected.safetensors")


if __name__ == "__main__":
    main()
