"""The Hugging Face half of `bench_speed.py`, run where transformers is a current one; knows nothing of this package.

Reads a JSON object a line, does what it asks for once, and answers with a line: the seconds it took.

    {"build": {sizes}, "precision": "fp32", "device": "cpu"}                 build the model
    {"do": "train", "images": 8, "questions": 1, "text": 32}                  a training step
    {"do": "generate", "images": 8, "questions": 1, "text": 4, "beams": 5, "new": 20}
    {"do": "memory"}                                                          the most memory since the last line
"""

import json
import sys
import time

import torch
import transformers
from speed_memory import peak_gib
from transformers import Blip2Config, Blip2ForConditionalGeneration

DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16, fp32=torch.float32)
QUERIES, IMAGE = 32, 50265


class Side:
    """The model, and what it is asked to do."""

    def build(self, sizes, precision, device):
        """The frozen towers in ``precision``, what is trained in float32, as ours."""
        config = Blip2Config(
            vision_config=dict(sizes["vision"], image_size=224, patch_size=14),
            qformer_config=dict(sizes["qformer"], encoder_hidden_size=sizes["vision"]["hidden_size"]),
            text_config=dict(
                sizes["text"],
                model_type="opt",
                word_embed_proj_dim=sizes["text"]["hidden_size"],
                vocab_size=50304,
                max_position_embeddings=2048,
            ),
            num_query_tokens=QUERIES,
            image_token_index=IMAGE,
        )
        self.device, self.dtype = device, DTYPES[precision]
        torch.set_default_dtype(self.dtype)
        with torch.device(device):
            self.model = Blip2ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        self.model.requires_grad_(False)
        trained = [*self.model.qformer.parameters(), *self.model.language_projection.parameters()]
        for parameter in [*trained, self.model.query_tokens]:
            parameter.requires_grad, parameter.data = True, parameter.data.float()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def inputs(self, images, questions, text):
        """It has an image for each text: one that has several is repeated."""
        count = images * questions
        pixels = torch.randn(images, 3, 224, 224, device=self.device).repeat_interleave(questions, dim=0)
        ids = torch.cat([torch.full((count, QUERIES), IMAGE), torch.randint(5, 50000, (count, text))], 1)
        ids = ids.to(self.device)
        return dict(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))

    def autocast(self):
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def train(self, images, questions, text):
        given = self.inputs(images, questions, text)
        labels = given["input_ids"].clone()
        labels[:, :QUERIES] = -100
        self.model.train()

        def step():
            with self.autocast():
                loss = self.model(**given, labels=labels).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step

    def generate(self, images, questions, text, beams, new):
        given = self.inputs(images, questions, text)
        self.model.eval()

        def search():
            with torch.no_grad(), self.autocast():
                self.model.generate(**given, num_beams=beams, min_new_tokens=new, max_new_tokens=new)

        return search

    def timed(self, work):
        """Seconds of one run."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def main():
    side = Side()
    transformers.logging.set_verbosity_error()
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    imported = peak_gib("cpu") if sys.platform == "linux" else 0.0
    for line in sys.stdin:
        asked = json.loads(line)
        if "build" in asked:
            answer = side.build(asked["build"], asked["precision"], asked["device"])
        elif asked["do"] == "memory":
            answer = {"gib": peak_gib(side.device) - (0.0 if side.device == "cuda" else imported)}
        else:
            do = asked.pop("do")
            answer = {"s": side.timed(getattr(side, do)(**asked))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
