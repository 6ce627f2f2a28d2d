"""
Loads a shared model by its own code and records its answers; run as a script, in a process that has no `mglmm`:

    python -I remote_code.py SOURCE PICTURE OUTPUT

SOURCE is a folder or a hub id. OUTPUT becomes a folder: `answers.npz`, and `resaved/`, the model saved again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TASK = "image-segmentation-captioning"


def answers(model: Any, processor: Any, pipe: Any, picture: Path) -> dict[str, np.ndarray]:
    """What a model says about a picture, by `forward`, `generate` and the pipeline; every second token is `[SEG]`."""
    for network in {model, pipe.model}:
        # A loaded weight lies in the file's memory map, at any address; matrix products may round by the alignment.
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    seg, eos = processor.seg_token_id, processor.tokenizer.eos_token_id
    words = [token for token in range(len(processor.tokenizer)) if token not in (seg, eos, processor.image_token_id)]
    script = {
        "prefix_allowed_tokens_fn": lambda row, ids: [seg] if ids[-1] != seg else words,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = Image.open(picture)
    inputs = processor(images=[image], text=[prompt + "<p> a hat </p> [SEG]"], return_tensors="pt")
    del inputs["original_sizes"]
    with torch.no_grad():
        outputs = model(**inputs)
        generated = model.generate(**inputs, **script, output_masks=True)
    segcap = pipe(image, **script)
    return {
        "logits": outputs.logits.numpy(),
        "masks": outputs.pred_masks.numpy(),
        "generated_ids": generated.generated_ids.numpy(),
        "generated_masks": generated.pred_masks[0].numpy(),
        "scores": generated.mask_scores[0].numpy(),
        "segcap": np.array(json.dumps(segcap.to_dict())),
    }


def main(source: str, picture: Path, output: Path) -> None:
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    pipe = pipeline(TASK, model=source, trust_remote_code=True)
    base = AutoModel.from_pretrained(source, trust_remote_code=True)
    for thing in (model, processor, pipe, base):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    different = [name for name, value in model.model.state_dict().items() if not value.equal(base.state_dict()[name])]
    assert different == []
    np.savez(output / "answers.npz", **answers(model, processor, pipe, picture))
    pipe.model.save_pretrained(output / "resaved")
    processor.save_pretrained(output / "resaved")
    assert [name for name, module in sys.modules.items() if module and name.partition(".")[0] == "mglmm"] == []


if __name__ == "__main__":
    sys.modules["mglmm"] = None  # type: ignore[assignment]  # importing it raises ImportError, even where it is installed
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
