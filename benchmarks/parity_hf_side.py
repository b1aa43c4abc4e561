"""The Hugging Face half of `parity_hf.py`, run where transformers is a current one; knows nothing of this package.

python parity_hf_side.py make FOLDER LIKE      a small random BLIP-2 of the size of LIKE, saved by save_pretrained
python parity_hf_side.py answer FOLDER WORK    its logits and greedy tokens for WORK/inputs.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, logging


def make(folder: Path, like: Path) -> None:
    """Write a random model into FOLDER."""
    torch.manual_seed(3)
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(like))
    with torch.no_grad():  # transformers starts the image encoder at 1e-10, and the query tokens at 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")


@torch.no_grad()
def answer(folder: Path, work: Path) -> None:
    """Write WORK/hf_outputs.safetensors."""
    inputs = load_file(work / "inputs.safetensors")
    model, report = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: keys for kind, keys in report.items() if keys}
    if wrong:
        sys.exit(f"{folder} does not fit: {wrong}")
    model.eval()
    image = int(inputs["image"])
    model.config.image_token_index = image
    places = inputs["input_ids"]
    ids = torch.where(places < 0, image, places)
    given = dict(pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=inputs["attention_mask"])
    logits = model(**given).logits
    tokens = model.generate(
        **given,
        do_sample=False,
        num_beams=1,
        max_new_tokens=int(inputs["new_tokens"]),
        eos_token_id=int(inputs["end"]),
        pad_token_id=int(inputs["pad"]),
    )[:, ids.shape[1] :]
    model.vision_model.post_layernorm.eps = 1e-5
    found = {"logits": logits, "tokens": tokens, "logits_one_eps": model(**given).logits}
    save_file({name: value.contiguous() for name, value in found.items()}, work / "hf_outputs.safetensors")


if __name__ == "__main__":
    logging.set_verbosity_error()
    {"make": make, "answer": answer}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
