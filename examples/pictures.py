"""Pictures: a small ViT learns scikit-learn's digits; tokens that are alike are merged; patches that leave are shown.

python examples/pictures.py             writes runs/pictures/digit.html
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from thresher import ToMe, TopK, prune, unprune
from thresher.reports import patches

SIZES = {"image_size": 16, "patch_size": 2, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
SIZES |= {"intermediate_size": 96, "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES |= {"initializer_range": 0.1}  # as small as the model is


def drawn(digits: np.ndarray) -> torch.Tensor:
    """Pictures (B, 3, 16, 16) in [-1, 1] of digits (B, 64), each pixel four times."""
    pixels = torch.as_tensor(digits, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


def main(out: Path = Path("runs/pictures"), steps: int = 400) -> dict[str, float]:
    """Accuracy on 300 digits after so many steps of 32: dense, merged, and with half of the patches gone."""
    torch.manual_seed(0)
    digits, classes = load_digits(return_X_y=True)
    pixels, labels = drawn(digits), torch.as_tensor(classes)
    model = ViTForImageClassification(ViTConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in torch.randint(300, len(pixels), (steps, 32)):
        model.train()(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def accuracy() -> float:
        return float((model.eval()(pixel_values=pixels[:300]).logits.argmax(1) == labels[:300]).float().mean())

    found = {"dense": accuracy()}
    for name, method in (("ToMe", ToMe(r=0.2)), ("TopK", TopK(keep=0.7))):
        prune(model, method)
        found[name] = accuracy()
        macs = float(model.token_pruner.record.flops_fraction())
        print(f"{name}: {found[name]:.1%} right, dense {found['dense']:.1%}, with {macs:.0%} of the MACs")
        if name != "TopK":
            unprune(model)
    picture = Image.fromarray((16 * digits[3].reshape(8, 8)).clip(0, 255).astype("uint8")).convert("RGB")
    traced = patches.trace(model, ViTImageProcessorPil(size={"height": 16, "width": 16}), picture.resize((64, 64)))
    patches.html([traced], out / "digit.html")
    print(f"which patch leaves where: {out / 'digit.html'}")
    return found


if __name__ == "__main__":
    main()
