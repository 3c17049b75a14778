"""Language models that read pictures, from folders and the hub; pictures from files, and questions about them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..core.pictures import IMAGE, placeholders
from .files import reading
from .models import opened
from .read import read
from .spec import DataSpec
from .task import require

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("image", "question")  # of a table of pairs, where no others are named


def reads_pictures(model: str | None) -> bool:
    """Whether a folder, or a name on the hub, is a language model that reads pictures."""
    try:
        config: Any = AutoConfig.from_pretrained(model or "")
    except Exception:  # of many kinds; whoever opens the model says what is wrong with it
        return False
    answers = any(name.endswith("ForConditionalGeneration") for name in config.architectures or ())
    return answers and IMAGE in placeholders(config)


def load_reader(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Return a saved language model that reads pictures, and its processor; else as ``models.load``.

    Raises:
        ValueError: no such model, one that cannot be read, or a library that its processor needs is missing.
    """
    net = opened(lambda: reading(AutoModelForImageTextToText.from_pretrained, model), model, layout)
    try:
        return net, reading(AutoProcessor.from_pretrained, model)
    except ImportError as error:
        needs = next(line.strip() for line in str(error).splitlines() if line.strip())
        raise ValueError(f"the processor of {model} needs a library that is missing: {needs}") from error


def asked(processor: Any, picture: Image, question: str) -> dict[str, Any]:
    """Return the inputs of a model for a question about a picture, put as its chat template says.

    Raises:
        ValueError: it has neither a template nor a token for a picture.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif isinstance(token := getattr(processor, "image_token", None), str):
        text = f"{token}\n{question}"
    else:
        raise ValueError(f"{type(processor).__name__} has no chat template, and does not say what stands for a picture")
    begins = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    once = {"add_special_tokens": False} if begins and text.startswith(begins) else {}  # where the template has it
    return dict(processor(images=[picture], text=[text], return_tensors="pt", **once))


def read_pairs(spec: DataSpec) -> list[tuple[Path, str]]:
    """Return the pictures and questions of a table with the columns image and question, or those that ``spec.text``
    names; files are relative to the table. Raises DataError where there are none."""
    columns = spec.text or COLUMNS
    require(len(columns) == 2, f"text={','.join(columns)}: expected two columns, of pictures and questions")
    place = Path(os.path.abspath(os.path.expanduser(spec.data)))
    require(place.exists(), f"there is no {spec.data}: expected a table with the columns {' and '.join(columns)}")
    name, parts = read(spec.data, spec.config, (spec.train_split, spec.test_split))
    part = spec.train_split or next((one for one in ("train", "validation") if one in parts), "train")
    require(part in parts, f"{name} has no part {part}, but {', '.join(parts)}: test chooses nothing, name a part")
    frame = parts[part]
    for column in columns:
        require(column in frame, f"{name} has no column {column!r}: expected {' and '.join(columns)}")
    folder = place if place.is_dir() else place.parent
    rows = frame[[*columns]].dropna().astype(str).itertuples(index=False)
    pairs = [(folder / image, question) for image, question in rows][: spec.limit]
    require(pairs, f"{name} holds no picture with a question")
    return pairs


def pillow() -> Any:
    """Return PIL. Raises ValueError where it is missing."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ValueError("pictures need PIL, which is missing: pip install pillow") from None
    return PIL


def read_picture(image: str | os.PathLike | Image) -> Image:
    """Return the picture in a file, or one of PIL, in RGB. Raises ValueError of one line where it is none."""
    pil = pillow()
    if hasattr(image, "convert"):
        return image.convert("RGB")
    try:
        with pil.Image.open(image) as opened:
            return pil.ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no file {image}") from None
    except (OSError, SyntaxError, pil.Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{image} cannot be read as a picture ({error}): expected a PNG, JPEG, ...") from None
